//! PTX as text: its parts, and a body's statements.

use std::collections::HashMap;
use std::sync::Arc;

/// A kernel or a function: its parameters and its body.
pub(super) struct Part {
    pub(super) is_entry: bool,
    pub(super) returns: Vec<Variable>,
    pub(super) parameters: Vec<Variable>,
    pub(super) body: String,
}

/// A variable outside registers.
#[derive(Clone, Debug)]
pub(super) struct Variable {
    pub(super) name: String,
    pub(super) bytes: usize,
    pub(super) align: usize,
}

/// One statement of a body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Statement {
    Open,
    Close,
    Label(String),
    Line(String),
}

/// All of a module.
#[derive(Default)]
pub(super) struct Parts {
    pub(super) functions: HashMap<String, Part>,
    /// The content of global variables.
    pub(super) globals: HashMap<String, Arc<Vec<u64>>>,
    /// Variables in shared memory that several functions use. Those of no size are what comes after all others, of
    /// a size that the launch says.
    pub(super) shared: Vec<Variable>,
}

/// Takes a module apart.
pub(super) fn split(text: &str) -> Result<Parts, String> {
    let text = without_comments(text);
    let mut parts = Parts::default();
    let mut rest = text.as_str();
    if !rest.contains(".version") {
        return Err("this is no PTX".to_owned());
    }
    while let Some(at) = rest.find('.') {
        rest = &rest[at..];
        let end = rest.find([';', '{', '\n']).unwrap_or(rest.len());
        let head = &rest[..end];
        if head.starts_with(".version")
            || head.starts_with(".target")
            || head.starts_with(".address_size")
        {
            rest = &rest[end..];
        } else if head.contains(".entry") || head.contains(".func") {
            rest = function(rest, &mut parts.functions)?;
        } else {
            // A variable: up to the semicolon.
            let end = rest.find(';').ok_or("a variable without an end")?;
            global(&rest[..end], &mut parts)?;
            rest = &rest[end..];
        }
        rest = rest.trim_start_matches([';', '\n']);
    }
    Ok(parts)
}

fn without_comments(text: &str) -> String {
    let lines = text.lines().map(|line| line.find("//").map_or(line, |at| &line[..at]));
    lines.collect::<Vec<_>>().join("\n")
}

/// Reads a kernel or a function, which may be a declaration only; what comes after it.
fn function<'a>(text: &'a str, parts: &mut HashMap<String, Part>) -> Result<&'a str, String> {
    let is_entry = text[..text.find(['(', '{', ';']).unwrap_or(text.len())].contains(".entry");
    let keyword = if is_entry { ".entry" } else { ".func" };
    let at = text.find(keyword).ok_or("no function")? + keyword.len();
    let mut rest = text[at..].trim_start();
    let mut returns = Vec::new();
    if rest.starts_with('(') {
        let end = rest.find(')').ok_or("a function without an end")?;
        returns = variables(&rest[1..end])?;
        rest = rest[end + 1..].trim_start();
    }
    let end = rest.find(|c: char| c.is_whitespace() || "({;".contains(c)).unwrap_or(rest.len());
    let name = rest[..end].to_owned();
    rest = rest[end..].trim_start();
    let mut parameters = Vec::new();
    if rest.starts_with('(') {
        let end = rest.find(')').ok_or("a function without an end")?;
        parameters = variables(&rest[1..end])?;
        rest = &rest[end + 1..];
    }
    let end = rest.find(['{', ';']).ok_or("a function without a body")?;
    if rest[end..].starts_with(';') {
        return Ok(&rest[end..]);
    }
    let mut depth = 0;
    for (i, c) in rest.char_indices().skip_while(|&(i, _)| i < end) {
        depth += i32::from(c == '{') - i32::from(c == '}');
        if depth == 0 {
            let body = rest[end + 1..i].to_owned();
            parts.insert(name, Part { is_entry, returns, parameters, body });
            return Ok(&rest[i + 1..]);
        }
    }
    Err(format!("{name} has no end"))
}

fn variables(list: &str) -> Result<Vec<Variable>, String> {
    list.split(',').map(str::trim).filter(|one| !one.is_empty()).map(variable).collect()
}

/// Of a declaration such as `.param .align 8 .b8 name[16]`.
pub(super) fn variable(declaration: &str) -> Result<Variable, String> {
    let mut align = None;
    let mut size = None;
    let mut words = declaration.split_whitespace();
    let mut last = "";
    while let Some(word) = words.next() {
        match word {
            ".align" => align = words.next().and_then(|n| n.parse().ok()),
            word if word.starts_with('.') => size = bytes_of(word).or(size),
            word => last = word,
        }
    }
    let size = size.ok_or_else(|| format!("of what size is {declaration}?"))?;
    let (name, count) = match last.split_once('[') {
        None => (last, 1),
        Some((name, count)) => (name, count.trim_end_matches(']').parse().unwrap_or(0)),
    };
    Ok(Variable { name: name.to_owned(), bytes: size * count, align: align.unwrap_or(size) })
}

pub(super) fn bytes_of(word: &str) -> Option<usize> {
    let digits = word.trim_start_matches(|c: char| !c.is_ascii_digit());
    match (word.get(..2)?, digits) {
        (".b" | ".u" | ".s" | ".f", "8") => Some(1),
        (".b" | ".u" | ".s" | ".f", "16") => Some(2),
        (".b" | ".u" | ".s" | ".f", "32") => Some(4),
        (".b" | ".u" | ".s" | ".f", "64") => Some(8),
        _ => None,
    }
}

fn global(text: &str, parts: &mut Parts) -> Result<(), String> {
    let (declaration, content) = text.split_once('=').unwrap_or((text, ""));
    let variable = variable(declaration.trim())?;
    if declaration.contains(".shared") {
        parts.shared.push(variable);
        return Ok(());
    }
    let mut bytes = vec![0u8; variable.bytes.max(1)];
    let wide = declaration.split_whitespace().filter_map(bytes_of).next_back().unwrap_or(1);
    let numbers = content.trim().trim_start_matches('{').trim_end_matches('}');
    for (to, number) in bytes.chunks_mut(wide).zip(numbers.split(',').map(str::trim)) {
        if number.is_empty() {
            continue;
        }
        let number = super::decode::number(number).ok_or_else(|| format!("what is {number}?"))?;
        to.copy_from_slice(&number.to_le_bytes()[..to.len()]);
    }
    bytes.resize(bytes.len().next_multiple_of(8), 0);
    let words = bytes.as_chunks::<8>().0.iter().map(|&chunk| u64::from_le_bytes(chunk)).collect();
    parts.globals.insert(variable.name, Arc::new(words));
    Ok(())
}

/// A body's statements in their order.
pub(super) fn statements(body: &str) -> Vec<Statement> {
    let mut all = Vec::new();
    let mut rest = body.trim_start();
    while let Some(first) = rest.chars().next() {
        match first {
            '{' => all.push(Statement::Open),
            '}' => all.push(Statement::Close),
            ';' => {}
            _ => {
                let end = rest.find([';', ':']).unwrap_or(rest.len());
                // `a::b` is one word.
                if rest[end..].starts_with(':') && !rest[end..].starts_with("::") {
                    all.push(Statement::Label(rest[..end].trim().to_owned()));
                    rest = &rest[end..];
                } else {
                    let end = rest.find(';').unwrap_or(rest.len());
                    let words: Vec<&str> = rest[..end].split_whitespace().collect();
                    all.push(Statement::Line(words.join(" ")));
                    rest = &rest[end..];
                    if rest.is_empty() {
                        break;
                    }
                }
            }
        }
        rest = rest[1..].trim_start();
    }
    all
}
