//! From statements to steps: names, declarations, jumps and calls.

use std::collections::HashMap;

use super::lanes::{Condition, Space, Warp};
use super::rounding::Half;
use super::text::{Part, Parts, Statement, Variable, bytes_of, statements, variable};
use super::{Code, Run, Special, Step};

type Parameters = Vec<(usize, usize)>;

/// A kernel's steps and its parameters' places.
pub(super) fn decode(part: &Part, parts: &Parts) -> Result<(Code, Parameters), String> {
    let mut decoder = Decoder {
        parts,
        code: Code {
            steps: Vec::new(),
            lines: Vec::new(),
            words: 0,
            longs: 0,
            predicates: 0,
            constants: Vec::new(),
            long_constants: Vec::new(),
            specials: Vec::new(),
            shared: 0,
            local: 0,
            globals: Vec::new(),
        },
        scopes: vec![HashMap::new()],
        labels: HashMap::new(),
        open: Vec::new(),
        bodies: 0,
        depth: 0,
    };
    let mut parameters = Vec::new();
    let mut end = 0usize;
    for Variable { name, bytes, align } in &part.parameters {
        let at = end.next_multiple_of(*align);
        decoder.name(name, Item::Variable(Space::Parameter, at as u64));
        parameters.push((at, *bytes));
        end = at + bytes;
    }
    // Those that others use take nothing away from what a block may have.
    let is_used = |name: &str| {
        let others = parts.functions.values().filter(|other| !other.is_entry);
        std::iter::once(part).chain(others).any(|part| part.body.contains(name))
    };
    for Variable { name, bytes, align } in &parts.shared {
        if *bytes > 0 && is_used(name) {
            let at = decoder.code.shared.next_multiple_of(*align);
            decoder.code.shared = at + bytes;
            decoder.name(name, Item::Variable(Space::Shared, at as u64));
        }
    }
    decoder.body(&part.body, None)?;
    decoder.push(Step::End { when: None }, "ret");
    for (step, label) in &decoder.open {
        let to = *decoder.labels.get(label).ok_or_else(|| format!("there is no label {label}"))?;
        if let Step::Branch { to: place, .. } = &mut decoder.code.steps[*step] {
            *place = to;
        }
    }
    let of_globals = parts.globals.values().map(|words| words.as_ptr_range());
    decoder.code.globals = of_globals.map(|range| (range.start as u64, range.end as u64)).collect();
    Ok((decoder.code, parameters))
}

/// What a name stands for.
#[derive(Clone, Copy)]
pub(super) enum Item {
    Word(usize),
    Long(usize),
    Predicate(usize),
    /// The first of several.
    Words(usize),
    Longs(usize),
    Predicates(usize),
    Variable(Space, u64),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Kind {
    Unsigned,
    Signed,
    Bits,
    Float,
    Bf,
    Predicate,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Type {
    pub(super) kind: Kind,
    pub(super) bits: usize,
}

impl Type {
    pub(super) fn parse(word: &str) -> Option<Self> {
        if word == "pred" {
            return Some(Self { kind: Kind::Predicate, bits: 1 });
        }
        let digits = word.trim_start_matches(|c: char| c.is_ascii_alphabetic());
        let kind = match &word[..word.len() - digits.len()] {
            "u" => Kind::Unsigned,
            "s" => Kind::Signed,
            "b" => Kind::Bits,
            "f" => Kind::Float,
            "bf" => Kind::Bf,
            _ => return None,
        };
        Some(Self { kind, bits: digits.parse().ok()? })
    }

    pub(super) fn is_float(self) -> bool {
        matches!(self.kind, Kind::Float | Kind::Bf)
    }

    /// Its format, of a float of 16 bits.
    pub(super) fn half(self) -> Option<Half> {
        match (self.kind, self.bits) {
            (Kind::Float, 16) => Some(Half::F16),
            (Kind::Bf, 16) => Some(Half::Bf16),
            _ => None,
        }
    }

    pub(super) fn is_signed(self) -> bool {
        self.kind == Kind::Signed
    }
}

/// A number as PTX writes it, as bits.
pub(super) fn number(text: &str) -> Option<u64> {
    let text = text.trim();
    if let Some(hex) = text.strip_prefix("0f").or_else(|| text.strip_prefix("0F"))
        && hex.len() == 8
    {
        return u64::from_str_radix(hex, 16).ok();
    }
    if let Some(hex) = text.strip_prefix("0d").or_else(|| text.strip_prefix("0D"))
        && hex.len() == 16
    {
        return u64::from_str_radix(hex, 16).ok();
    }
    let (negative, digits) = text.strip_prefix('-').map_or((false, text), |rest| (true, rest));
    let digits = digits.trim_end_matches('U');
    let value = match digits.strip_prefix("0x").or_else(|| digits.strip_prefix("0X")) {
        Some(hex) => u64::from_str_radix(hex, 16).ok()?,
        None => digits.parse().ok()?,
    };
    Some(if negative { value.wrapping_neg() } else { value })
}

/// Parts between commas, where no bracket is open.
pub(super) fn operands(text: &str) -> Vec<String> {
    let (mut all, mut depth, mut one) = (Vec::new(), 0, String::new());
    for c in text.chars() {
        depth += i32::from("([{".contains(c)) - i32::from(")]}".contains(c));
        if c == ',' && depth == 0 {
            all.push(std::mem::take(&mut one).trim().to_owned());
        } else {
            one.push(c);
        }
    }
    if !one.trim().is_empty() {
        all.push(one.trim().to_owned());
    }
    all
}

pub(super) struct Decoder<'a> {
    pub(super) parts: &'a Parts,
    pub(super) code: Code,
    pub(super) scopes: Vec<HashMap<String, Item>>,
    pub(super) labels: HashMap<String, usize>,
    /// Branches whose label's place is not known yet.
    pub(super) open: Vec<(usize, String)>,
    /// Bodies so far: each call has its function's body once more.
    pub(super) bodies: usize,
    pub(super) depth: usize,
}

impl Decoder<'_> {
    pub(super) fn name(&mut self, name: &str, item: Item) {
        if let Some(scope) = self.scopes.last_mut() {
            scope.insert(name.to_owned(), item);
        }
    }

    pub(super) fn push(&mut self, step: Step, line: &str) {
        self.code.steps.push(step);
        self.code.lines.push(line.to_owned());
    }

    /// All statements of a body; of a function that is called, `end` is where it returns to.
    pub(super) fn body(&mut self, text: &str, end: Option<&str>) -> Result<(), String> {
        let number = self.bodies;
        self.bodies += 1;
        for statement in statements(text) {
            match statement {
                Statement::Open => self.scopes.push(HashMap::new()),
                Statement::Close => {
                    self.scopes.pop();
                }
                Statement::Label(name) => {
                    self.labels.insert(format!("{number}:{name}"), self.code.steps.len());
                }
                Statement::Line(line) => {
                    self.line(&line, number, end).map_err(|why| format!("{line}: {why}"))?;
                }
            }
        }
        Ok(())
    }

    pub(super) fn look_up(&self, name: &str) -> Option<Item> {
        let prefix = name.trim_end_matches(|c: char| c.is_ascii_digit());
        let index = name[prefix.len()..].parse::<usize>().ok();
        for scope in self.scopes.iter().rev() {
            if let Some(item) = scope.get(name) {
                return Some(*item);
            }
            if let (Some(index), Some(item)) = (index, scope.get(&format!("{prefix}<"))) {
                return Some(match *item {
                    Item::Words(first) => Item::Word(first + index),
                    Item::Longs(first) => Item::Long(first + index),
                    Item::Predicates(first) => Item::Predicate(first + index),
                    other => other,
                });
            }
        }
        let words = self.parts.globals.get(name)?;
        Some(Item::Variable(Space::Global, words.as_ptr() as u64))
    }

    pub(super) fn new_word(&mut self) -> usize {
        self.code.words += 1;
        self.code.words - 1
    }

    pub(super) fn new_long(&mut self) -> usize {
        self.code.longs += 1;
        self.code.longs - 1
    }

    pub(super) fn constant(&mut self, value: u32) -> usize {
        if let Some(&(register, _)) = self.code.constants.iter().find(|&&(_, known)| known == value)
        {
            return register;
        }
        let register = self.new_word();
        self.code.constants.push((register, value));
        register
    }

    pub(super) fn long_constant(&mut self, value: u64) -> usize {
        if let Some(&(register, _)) =
            self.code.long_constants.iter().find(|&&(_, known)| known == value)
        {
            return register;
        }
        let register = self.new_long();
        self.code.long_constants.push((register, value));
        register
    }

    pub(super) fn special(&mut self, name: &str) -> Option<usize> {
        let axis = |name: &str| match name.rsplit('.').next()? {
            "x" => Some(0),
            "y" => Some(1),
            "z" => Some(2),
            _ => None,
        };
        let special = match name.split('.').next()? {
            "%tid" => Special::Thread(axis(name)?),
            "%ntid" => Special::Threads(axis(name)?),
            "%ctaid" => Special::Block(axis(name)?),
            "%nctaid" => Special::Blocks(axis(name)?),
            "%laneid" => Special::Lane,
            "%warpid" => Special::Warp,
            "%clock" => Special::Zero,
            _ => return None,
        };
        if let Some(&(register, _)) =
            self.code.specials.iter().find(|&&(_, known)| known == special)
        {
            return Some(register);
        }
        let register = self.new_word();
        self.code.specials.push((register, special));
        Some(register)
    }

    /// A register of up to 32 bits, or what has one.
    pub(super) fn word(&mut self, text: &str) -> Result<usize, String> {
        match self.look_up(text) {
            Some(Item::Word(register)) => return Ok(register),
            Some(Item::Variable(_, address)) => return Ok(self.constant(address as u32)),
            _ => {}
        }
        if let Some(register) = self.special(text) {
            return Ok(register);
        }
        if text == "WARP_SZ" {
            return Ok(self.constant(32));
        }
        if let Some(value) = number(text) {
            return Ok(self.constant(value as u32));
        }
        Err(format!("what is {text}?"))
    }

    pub(super) fn long(&mut self, text: &str) -> Result<usize, String> {
        match self.look_up(text) {
            Some(Item::Long(register)) => return Ok(register),
            Some(Item::Variable(_, address)) => return Ok(self.long_constant(address)),
            _ => {}
        }
        number(text)
            .map(|value| self.long_constant(value))
            .ok_or_else(|| format!("what is {text}?"))
    }

    /// A predicate, or its opposite where the text says so.
    pub(super) fn condition(&self, text: &str) -> Result<Condition, String> {
        let (negated, name) = text.strip_prefix('!').map_or((false, text), |rest| (true, rest));
        match self.look_up(name) {
            Some(Item::Predicate(predicate)) => Ok(Condition { predicate, negated }),
            _ => Err(format!("what is {text}?")),
        }
    }

    /// The register of a predicate to be set.
    pub(super) fn predicate(&self, text: &str) -> Result<usize, String> {
        Ok(self.condition(text.trim())?.predicate)
    }

    pub(super) fn words<const N: usize>(&mut self, texts: &[String]) -> Result<[usize; N], String> {
        let mut to = [0; N];
        for (i, to) in to.iter_mut().enumerate() {
            *to = self.word(texts.get(i).ok_or("too few operands")?)?;
        }
        Ok(to)
    }

    pub(super) fn longs<const N: usize>(&mut self, texts: &[String]) -> Result<[usize; N], String> {
        let mut to = [0; N];
        for (i, to) in to.iter_mut().enumerate() {
            *to = self.long(texts.get(i).ok_or("too few operands")?)?;
        }
        Ok(to)
    }

    pub(super) fn declaration(&mut self, line: &str) -> Result<(), String> {
        if let Some(rest) = line.strip_prefix(".reg") {
            let (of, names) = rest.trim().split_once(' ').ok_or("a register without a name")?;
            let is_predicate = of == ".pred";
            let is_long = bytes_of(of) == Some(8);
            for name in names.split(',').map(str::trim) {
                let (key, count) = match name.split_once('<') {
                    Some((prefix, count)) => {
                        (format!("{prefix}<"), count.trim_end_matches('>').parse().unwrap_or(0))
                    }
                    None => (name.to_owned(), 1usize),
                };
                let is_one = !key.ends_with('<');
                let all = if is_predicate {
                    &mut self.code.predicates
                } else if is_long {
                    &mut self.code.longs
                } else {
                    &mut self.code.words
                };
                let first = *all;
                *all += count;
                let item = match (is_predicate, is_long, is_one) {
                    (true, _, true) => Item::Predicate(first),
                    (true, _, false) => Item::Predicates(first),
                    (_, true, true) => Item::Long(first),
                    (_, true, false) => Item::Longs(first),
                    (_, _, true) => Item::Word(first),
                    (_, _, false) => Item::Words(first),
                };
                self.name(&key, item);
            }
            return Ok(());
        }
        let variable = variable(line)?;
        let (space, end) = if line.starts_with(".shared") {
            (Space::Shared, &mut self.code.shared)
        } else if line.starts_with(".local") || line.starts_with(".param") {
            (Space::Local, &mut self.code.local)
        } else {
            return Err("unknown".to_owned());
        };
        let at = end.next_multiple_of(variable.align);
        *end = at + variable.bytes;
        self.name(&variable.name, Item::Variable(space, at as u64));
        Ok(())
    }

    pub(super) fn line(
        &mut self,
        line: &str,
        body: usize,
        end: Option<&str>,
    ) -> Result<(), String> {
        if line.starts_with('.') {
            if [".pragma ", ".loc ", ".file "].iter().any(|skipped| line.starts_with(skipped)) {
                return Ok(());
            }
            return self.declaration(line);
        }
        let (mut when, mut rest) = (None, line);
        if let Some(guarded) = line.strip_prefix('@') {
            let (name, after) = guarded.split_once(' ').ok_or("nothing after the guard")?;
            (when, rest) = (Some(self.condition(name)?), after);
        }
        let (opcode, arguments) = rest.split_once(' ').unwrap_or((rest, ""));
        let parts: Vec<&str> = opcode.split('.').collect();
        let arguments = operands(arguments);
        match parts[0] {
            "bra" => {
                let label = arguments.first().ok_or("where to?")?;
                self.open.push((self.code.steps.len(), format!("{body}:{label}")));
                self.push(Step::Branch { to: 0, when }, line);
            }
            "ret" | "exit" => match end {
                Some(label) if parts[0] == "ret" => {
                    self.open.push((self.code.steps.len(), label.to_owned()));
                    self.push(Step::Branch { to: 0, when }, line);
                }
                _ => self.push(Step::End { when }, line),
            },
            "bar" | "barrier" if parts.get(1) == Some(&"warp") => {}
            "bar" | "barrier" if parts.contains(&"sync") && when.is_none() => {
                self.push(Step::Barrier, line);
            }
            "membar" | "fence" | "prefetch" | "nanosleep" => {}
            "call" => {
                if when.is_some() {
                    return Err("a guarded call is not known".to_owned());
                }
                self.call(&arguments, line)?;
            }
            _ => {
                let run = self.step(&parts, &arguments)?;
                let run = match when {
                    None => run,
                    Some(when) => Box::new(move |w: &mut Warp<'_>, m: u32| {
                        let m = m & w.holds(when);
                        if m == 0 { Ok(()) } else { run(w, m) }
                    }) as Run,
                };
                self.push(Step::Do(run), line);
            }
        }
        Ok(())
    }

    /// The function's body once more, with the caller's variables as its parameters.
    pub(super) fn call(&mut self, arguments: &[String], line: &str) -> Result<(), String> {
        let list = |text: &str| operands(text.trim().trim_start_matches('(').trim_end_matches(')'));
        let returns =
            arguments.first().filter(|first| first.starts_with('(')).map(|first| list(first));
        let rest = &arguments[usize::from(returns.is_some())..];
        let name = rest.first().ok_or("whom?")?;
        if name == "vprintf" {
            return Ok(());
        }
        if name == "__assertfail" {
            let run: Run = Box::new(|_, _| Err("an assertion of the kernel's failed".to_owned()));
            self.push(Step::Do(run), line);
            return Ok(());
        }
        let part =
            self.parts.functions.get(name).ok_or_else(|| format!("there is no function {name}"))?;
        if self.depth > 8 {
            return Err("functions that call themselves are not known".to_owned());
        }
        let given = rest.get(1).map(|list_of| list(list_of)).unwrap_or_default();
        let mut scope = HashMap::new();
        let pairs = part.parameters.iter().zip(&given);
        for (variable, name) in pairs.chain(part.returns.iter().zip(returns.iter().flatten())) {
            let item = self.look_up(name).ok_or_else(|| format!("what is {name}?"))?;
            scope.insert(variable.name.clone(), item);
        }
        self.scopes.push(scope);
        self.depth += 1;
        let end = format!("end of {}", self.bodies);
        self.body(&part.body, Some(&end))?;
        self.labels.insert(end, self.code.steps.len());
        self.depth -= 1;
        self.scopes.pop();
        Ok(())
    }
}
