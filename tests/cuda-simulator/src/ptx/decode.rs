//! From statements to steps.

use std::collections::HashMap;

use super::float::{self, Mode};
use super::lanes::{Longs, Space, Warp, Words, for_each, lanes};
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
    for words in parts.globals.values() {
        let first = words.as_ptr() as u64;
        decoder.code.globals.push((first, first + 8 * words.len() as u64));
    }
    Ok((decoder.code, parameters))
}

/// What a name stands for.
#[derive(Clone, Copy)]
enum Item {
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
enum Kind {
    Unsigned,
    Signed,
    Bits,
    Float,
    Bf,
    Predicate,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Type {
    kind: Kind,
    bits: usize,
}

impl Type {
    fn parse(word: &str) -> Option<Self> {
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

    fn is_float(self) -> bool {
        matches!(self.kind, Kind::Float | Kind::Bf)
    }

    fn is_signed(self) -> bool {
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
fn operands(text: &str) -> Vec<String> {
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

/// An address: a register or nothing, and what is added.
#[derive(Clone, Copy)]
enum Base {
    None,
    Word(usize),
    Long(usize),
}

struct Decoder<'a> {
    parts: &'a Parts,
    code: Code,
    scopes: Vec<HashMap<String, Item>>,
    labels: HashMap<String, usize>,
    /// Branches whose label's place is not known yet.
    open: Vec<(usize, String)>,
    /// Bodies so far: each call has its function's body once more.
    bodies: usize,
    depth: usize,
}

macro_rules! run {
    (|$w:ident, $m:ident| $body:expr) => {
        Box::new(move |$w: &mut Warp<'_>, $m: u32| -> Result<(), String> {
            $body;
            Ok(())
        }) as Run
    };
}

fn w1(d: usize, a: usize, f: impl Fn(u32) -> u32 + Send + Sync + 'static) -> Run {
    run!(|w, m| {
        let x = &w.words[a];
        let to: Words = std::array::from_fn(|i| f(x[i]));
        w.set_words(d, m, &to);
    })
}

fn w2(d: usize, a: usize, b: usize, f: impl Fn(u32, u32) -> u32 + Send + Sync + 'static) -> Run {
    run!(|w, m| {
        let (x, y) = (&w.words[a], &w.words[b]);
        let to: Words = std::array::from_fn(|i| f(x[i], y[i]));
        w.set_words(d, m, &to);
    })
}

fn w3(d: usize, a: [usize; 3], f: impl Fn(u32, u32, u32) -> u32 + Send + Sync + 'static) -> Run {
    run!(|w, m| {
        let (x, y, z) = (&w.words[a[0]], &w.words[a[1]], &w.words[a[2]]);
        let to: Words = std::array::from_fn(|i| f(x[i], y[i], z[i]));
        w.set_words(d, m, &to);
    })
}

fn l1(d: usize, a: usize, f: impl Fn(u64) -> u64 + Send + Sync + 'static) -> Run {
    run!(|w, m| {
        let x = &w.longs[a];
        let to: Longs = std::array::from_fn(|i| f(x[i]));
        w.set_longs(d, m, &to);
    })
}

fn l2(d: usize, a: usize, b: usize, f: impl Fn(u64, u64) -> u64 + Send + Sync + 'static) -> Run {
    run!(|w, m| {
        let (x, y) = (&w.longs[a], &w.longs[b]);
        let to: Longs = std::array::from_fn(|i| f(x[i], y[i]));
        w.set_longs(d, m, &to);
    })
}

fn l3(d: usize, a: [usize; 3], f: impl Fn(u64, u64, u64) -> u64 + Send + Sync + 'static) -> Run {
    run!(|w, m| {
        let (x, y, z) = (&w.longs[a[0]], &w.longs[a[1]], &w.longs[a[2]]);
        let to: Longs = std::array::from_fn(|i| f(x[i], y[i], z[i]));
        w.set_longs(d, m, &to);
    })
}

fn wl(d: usize, a: usize, f: impl Fn(u32) -> u64 + Send + Sync + 'static) -> Run {
    run!(|w, m| {
        let x = &w.words[a];
        let to: Longs = std::array::from_fn(|i| f(x[i]));
        w.set_longs(d, m, &to);
    })
}

fn lw(d: usize, a: usize, f: impl Fn(u64) -> u32 + Send + Sync + 'static) -> Run {
    run!(|w, m| {
        let x = &w.longs[a];
        let to: Words = std::array::from_fn(|i| f(x[i]));
        w.set_words(d, m, &to);
    })
}

/// Of a long and a word, as in shifts.
fn lwl(d: usize, a: usize, b: usize, f: impl Fn(u64, u32) -> u64 + Send + Sync + 'static) -> Run {
    run!(|w, m| {
        let (x, y) = (&w.longs[a], &w.words[b]);
        let to: Longs = std::array::from_fn(|i| f(x[i], y[i]));
        w.set_longs(d, m, &to);
    })
}

fn w2l(d: usize, a: usize, b: usize, f: impl Fn(u32, u32) -> u64 + Send + Sync + 'static) -> Run {
    run!(|w, m| {
        let (x, y) = (&w.words[a], &w.words[b]);
        let to: Longs = std::array::from_fn(|i| f(x[i], y[i]));
        w.set_longs(d, m, &to);
    })
}

/// Which threads it holds of.
type Test = Box<dyn Fn(&Warp<'_>) -> u32 + Send + Sync>;

fn words_test(a: usize, b: usize, f: impl Fn(u32, u32) -> bool + Send + Sync + 'static) -> Test {
    Box::new(move |w| {
        let (x, y) = (&w.words[a], &w.words[b]);
        (0..32).fold(0, |mask, i| mask | u32::from(f(x[i], y[i])) << i)
    })
}

fn longs_test(a: usize, b: usize, f: impl Fn(u64, u64) -> bool + Send + Sync + 'static) -> Test {
    Box::new(move |w| {
        let (x, y) = (&w.longs[a], &w.longs[b]);
        (0..32).fold(0, |mask, i| mask | u32::from(f(x[i], y[i])) << i)
    })
}

fn f(x: u32) -> f32 {
    f32::from_bits(x)
}

fn d(x: u64) -> f64 {
    f64::from_bits(x)
}

fn short(x: u32) -> i32 {
    i32::from(x as i16)
}

const COMPARISONS: [&str; 18] = [
    "eq", "ne", "lt", "le", "gt", "ge", "lo", "ls", "hi", "hs", "equ", "neu", "ltu", "leu", "gtu",
    "geu", "num", "nan",
];

/// A test by a comparison, which is chosen here and not for each thread.
macro_rules! comparison {
    ($test:ident, $how:expr, $a:expr, $b:expr, $own:expr) => {{
        let (a, b, own) = ($a, $b, $own);
        match $how {
            "eq" => $test(a, b, move |x, y| own(x) == own(y)),
            "ne" => $test(a, b, move |x, y| own(x) < own(y) || own(x) > own(y)),
            "lt" | "lo" => $test(a, b, move |x, y| own(x) < own(y)),
            "le" | "ls" => $test(a, b, move |x, y| own(x) <= own(y)),
            "gt" | "hi" => $test(a, b, move |x, y| own(x) > own(y)),
            "ge" | "hs" => $test(a, b, move |x, y| own(x) >= own(y)),
            "equ" => $test(a, b, move |x, y| !(own(x) < own(y) || own(x) > own(y))),
            "neu" => $test(a, b, move |x, y| own(x) != own(y)),
            "ltu" => $test(a, b, move |x, y| !(own(x) >= own(y))),
            "leu" => $test(a, b, move |x, y| !(own(x) > own(y))),
            "gtu" => $test(a, b, move |x, y| !(own(x) <= own(y))),
            "geu" => $test(a, b, move |x, y| !(own(x) < own(y))),
            "num" => $test(a, b, move |x, y| own(x) == own(x) && own(y) == own(y)),
            "nan" => $test(a, b, move |x, y| own(x) != own(x) || own(y) != own(y)),
            _ => return Err("how?".to_owned()),
        }
    }};
}

impl Decoder<'_> {
    fn name(&mut self, name: &str, item: Item) {
        if let Some(scope) = self.scopes.last_mut() {
            scope.insert(name.to_owned(), item);
        }
    }

    fn push(&mut self, step: Step, line: &str) {
        self.code.steps.push(step);
        self.code.lines.push(line.to_owned());
    }

    /// All statements of a body; of a function that is called, `end` is where it returns to.
    fn body(&mut self, text: &str, end: Option<&str>) -> Result<(), String> {
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

    fn look_up(&self, name: &str) -> Option<Item> {
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

    fn new_word(&mut self) -> usize {
        self.code.words += 1;
        self.code.words - 1
    }

    fn new_long(&mut self) -> usize {
        self.code.longs += 1;
        self.code.longs - 1
    }

    fn constant(&mut self, value: u32) -> usize {
        if let Some(&(register, _)) = self.code.constants.iter().find(|&&(_, known)| known == value)
        {
            return register;
        }
        let register = self.new_word();
        self.code.constants.push((register, value));
        register
    }

    fn long_constant(&mut self, value: u64) -> usize {
        if let Some(&(register, _)) =
            self.code.long_constants.iter().find(|&&(_, known)| known == value)
        {
            return register;
        }
        let register = self.new_long();
        self.code.long_constants.push((register, value));
        register
    }

    fn special(&mut self, name: &str) -> Option<usize> {
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
    fn word(&mut self, text: &str) -> Result<usize, String> {
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

    fn long(&mut self, text: &str) -> Result<usize, String> {
        match self.look_up(text) {
            Some(Item::Long(register)) => return Ok(register),
            Some(Item::Variable(_, address)) => return Ok(self.long_constant(address)),
            _ => {}
        }
        number(text)
            .map(|value| self.long_constant(value))
            .ok_or_else(|| format!("what is {text}?"))
    }

    /// A predicate's register, and whether its opposite is meant.
    fn predicate(&self, text: &str) -> Result<(usize, bool), String> {
        let (negated, name) = text.strip_prefix('!').map_or((false, text), |rest| (true, rest));
        match self.look_up(name) {
            Some(Item::Predicate(register)) => Ok((register, negated)),
            _ => Err(format!("what is {text}?")),
        }
    }

    fn words<const N: usize>(&mut self, texts: &[String]) -> Result<[usize; N], String> {
        let mut to = [0; N];
        for (i, to) in to.iter_mut().enumerate() {
            *to = self.word(texts.get(i).ok_or("too few operands")?)?;
        }
        Ok(to)
    }

    fn longs<const N: usize>(&mut self, texts: &[String]) -> Result<[usize; N], String> {
        let mut to = [0; N];
        for (i, to) in to.iter_mut().enumerate() {
            *to = self.long(texts.get(i).ok_or("too few operands")?)?;
        }
        Ok(to)
    }

    fn declaration(&mut self, line: &str) -> Result<(), String> {
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

    fn line(&mut self, line: &str, body: usize, end: Option<&str>) -> Result<(), String> {
        if line.starts_with('.') {
            if [".pragma ", ".loc ", ".file "].iter().any(|skipped| line.starts_with(skipped)) {
                return Ok(());
            }
            return self.declaration(line);
        }
        let (mut when, mut rest) = (None, line);
        if let Some(guarded) = line.strip_prefix('@') {
            let (name, after) = guarded.split_once(' ').ok_or("nothing after the guard")?;
            let (register, negated) = self.predicate(name)?;
            (when, rest) = (Some((register, !negated)), after);
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
                    Some((register, wanted)) => Box::new(move |w: &mut Warp<'_>, m: u32| {
                        let which = w.predicates[register];
                        let m = m & if wanted { which } else { !which };
                        if m == 0 { Ok(()) } else { run(w, m) }
                    }) as Run,
                };
                self.push(Step::Do(run), line);
            }
        }
        Ok(())
    }

    /// The function's body once more, with the caller's variables as its parameters.
    fn call(&mut self, arguments: &[String], line: &str) -> Result<(), String> {
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

    /// What a statement without jumps does.
    fn step(&mut self, parts: &[&str], arguments: &[String]) -> Result<Run, String> {
        let types: Vec<Type> = parts[1..].iter().filter_map(|part| Type::parse(part)).collect();
        let last = *parts.last().unwrap_or(&"");
        let of = types.last().copied();
        let has = |word: &str| parts[1..].contains(&word);
        match parts[0] {
            "mov" => self.moved(of.ok_or("of what type?")?, arguments),
            "ld" | "ldu" => self.load(parts, of.ok_or("of what type?")?, arguments),
            "st" => self.store(parts, of.ok_or("of what type?")?, arguments),
            "atom" | "red" => self.atomic(parts, arguments),
            "cvta" => self.generic(parts, arguments),
            "cvt" => self.convert(parts, &types, arguments),
            "setp" => self.set_predicate(parts, of.ok_or("of what type?")?, arguments),
            "set" => {
                let [to, from] = types[..] else { return Err("between what types?".to_owned()) };
                let how =
                    *parts[1..].iter().find(|part| COMPARISONS.contains(part)).ok_or("how?")?;
                let test = self.test(how, from, arguments.get(1..3).ok_or("too few operands")?)?;
                let yes = match (to.kind, to.bits) {
                    (Kind::Float, 16) => 0x3c00,
                    (Kind::Bf, 16) => 0x3f80,
                    (Kind::Float, 32) => 1f32.to_bits(),
                    (_, 32) => u32::MAX,
                    _ => return Err("not known".to_owned()),
                };
                let d = self.word(&arguments[0])?;
                Ok(run!(|w, m| {
                    let mask = test(w);
                    let to: Words =
                        std::array::from_fn(|i| if mask >> i & 1 == 1 { yes } else { 0 });
                    w.set_words(d, m, &to);
                }))
            }
            "selp" => {
                let of = of.ok_or("of what type?")?;
                let (p, negated) = self.predicate(arguments.get(3).ok_or("too few operands")?)?;
                let flip = if negated { u32::MAX } else { 0 };
                if of.bits == 64 {
                    let [d, a, b] = self.longs(arguments)?;
                    return Ok(run!(|w, m| {
                        let (x, y, p) = (&w.longs[a], &w.longs[b], w.predicates[p] ^ flip);
                        let to = std::array::from_fn(|i| if p >> i & 1 == 1 { x[i] } else { y[i] });
                        w.set_longs(d, m, &to);
                    }));
                }
                let [d, a, b] = self.words(arguments)?;
                Ok(run!(|w, m| {
                    let (x, y, p) = (&w.words[a], &w.words[b], w.predicates[p] ^ flip);
                    let to = std::array::from_fn(|i| if p >> i & 1 == 1 { x[i] } else { y[i] });
                    w.set_words(d, m, &to);
                }))
            }
            "shfl" => self.shuffle(parts, arguments),
            "vote" if has("ballot") => {
                let d = self.word(&arguments[0])?;
                let (p, negated) = self.predicate(&arguments[1])?;
                Ok(run!(|w, m| {
                    let votes = (if negated { !w.predicates[p] } else { w.predicates[p] }) & m;
                    w.set_words(d, m, &[votes; 32]);
                }))
            }
            "vote" if has("any") || has("all") => {
                let (d, _) = self.predicate(&arguments[0])?;
                let (p, negated) = self.predicate(&arguments[1])?;
                let all = has("all");
                Ok(run!(|w, m| {
                    let votes = (if negated { !w.predicates[p] } else { w.predicates[p] }) & m;
                    let holds = if all { votes == m } else { votes != 0 };
                    w.set_predicate(d, m, if holds { u32::MAX } else { 0 });
                }))
            }
            "activemask" => {
                let d = self.word(&arguments[0])?;
                Ok(run!(|w, m| w.set_words(d, m, &[m; 32])))
            }
            "trap" => Ok(Box::new(|_, _| Err("the kernel gave up".to_owned()))),
            "add" | "sub" | "addc" | "subc" | "mad" | "madc"
                if has("cc") || matches!(parts[0], "addc" | "subc" | "madc") =>
            {
                self.carried(parts, of.ok_or("of what type?")?, arguments)
            }
            "prmt" if last == "b32" => {
                let a = self.words::<4>(arguments)?;
                Ok(w3(a[0], [a[1], a[2], a[3]], |x, y, which| {
                    let both = u64::from(y) << 32 | u64::from(x);
                    (0..4).fold(0, |to, i| {
                        let choice = which >> (4 * i) & 15;
                        let byte = (both >> (8 * (choice & 7))) as u8;
                        let byte = if choice & 8 != 0 { ((byte as i8) >> 7) as u8 } else { byte };
                        to | u32::from(byte) << (8 * i)
                    })
                }))
            }
            "bfi" => {
                let place = |x: u64, y: u64, at: u32, len: u32, bits: u32| {
                    let (at, len) = (at & 0xff, len & 0xff);
                    if at >= bits || len == 0 {
                        return y;
                    }
                    let len = len.min(bits - at);
                    let mask = (if len == 64 { u64::MAX } else { (1 << len) - 1 }) << at;
                    y & !mask | x << at & mask
                };
                let [at, len] = self.words(arguments.get(3..5).ok_or("too few operands")?)?;
                if last == "b64" {
                    let [d, a, b] = self.longs(arguments)?;
                    return Ok(run!(|w, m| {
                        let to = std::array::from_fn(|i| {
                            place(w.longs[a][i], w.longs[b][i], w.words[at][i], w.words[len][i], 64)
                        });
                        w.set_longs(d, m, &to);
                    }));
                }
                let [d, a, b] = self.words(arguments)?;
                Ok(run!(|w, m| {
                    let to = std::array::from_fn(|i| {
                        let (x, y) = (w.words[a][i].into(), w.words[b][i].into());
                        place(x, y, w.words[at][i], w.words[len][i], 32) as u32
                    });
                    w.set_words(d, m, &to);
                }))
            }
            "bfe" if of.is_some_and(|of| of.bits == 32) => {
                let a = self.words::<4>(arguments)?;
                let signed = of.is_some_and(Type::is_signed);
                Ok(w3(a[0], [a[1], a[2], a[3]], move |x, at, len| {
                    let (at, len) = (at & 0xff, len & 0xff);
                    if len == 0 {
                        return 0;
                    }
                    let wide =
                        if signed { i64::from(x as i32) } else { i64::from(x) } >> at.min(63);
                    let drop = 64 - len.min(64);
                    if signed {
                        (wide << drop >> drop) as u32
                    } else {
                        ((wide as u64) << drop >> drop) as u32
                    }
                }))
            }
            "shf" => {
                let a = self.words::<4>(arguments)?;
                let (left, wrap) = (has("l"), has("wrap"));
                Ok(w3(a[0], [a[1], a[2], a[3]], move |low, high, by| {
                    let by = if wrap { by & 31 } else { by.min(32) };
                    let both = u64::from(high) << 32 | u64::from(low);
                    if left { (both << by >> 32) as u32 } else { (both >> by) as u32 }
                }))
            }
            "clz" | "popc" => {
                let d = self.word(&arguments[0])?;
                let counts = parts[0] == "popc";
                if last == "b64" {
                    let a = self.long(&arguments[1])?;
                    return Ok(lw(
                        d,
                        a,
                        move |x| if counts { x.count_ones() } else { x.leading_zeros() },
                    ));
                }
                let a = self.word(&arguments[1])?;
                Ok(w1(d, a, move |x| if counts { x.count_ones() } else { x.leading_zeros() }))
            }
            "brev" if last == "b32" => {
                let [d, a] = self.words(arguments)?;
                Ok(w1(d, a, u32::reverse_bits))
            }
            "lop3" => {
                let a = self.words::<4>(arguments)?;
                let table =
                    number(arguments.get(4).ok_or("too few operands")?).ok_or("no table")? as u32;
                Ok(w3(a[0], [a[1], a[2], a[3]], move |x, y, z| {
                    (0..8).filter(|i| table >> i & 1 == 1).fold(0, |to, i| {
                        let of = |bit: u32, v: u32| if i >> bit & 1 == 1 { v } else { !v };
                        to | of(2, x) & of(1, y) & of(0, z)
                    })
                }))
            }
            _ if matches!(last, "bf16x2" | "f16x2") => self.packed(parts, last, arguments),
            _ => {
                let of = of.ok_or("of what type?")?;
                if of.is_float() || parts[0] == "copysign" {
                    self.float(parts, of, arguments)
                } else {
                    self.integer(parts, of, arguments)
                }
            }
        }
    }

    fn moved(&mut self, of: Type, arguments: &[String]) -> Result<Run, String> {
        let [to, from] = arguments else { return Err("two operands".to_owned()) };
        let pieces = |text: &str| operands(text.trim_start_matches('{').trim_end_matches('}'));
        if of.kind == Kind::Predicate {
            let (d, _) = self.predicate(to)?;
            if let Some(value) = number(from) {
                let value = if value == 0 { 0 } else { u32::MAX };
                return Ok(run!(|w, m| w.set_predicate(d, m, value)));
            }
            let (a, negated) = self.predicate(from)?;
            return Ok(run!(|w, m| {
                let value = if negated { !w.predicates[a] } else { w.predicates[a] };
                w.set_predicate(d, m, value);
            }));
        }
        if to.starts_with('{') {
            let names = pieces(to);
            let bits = of.bits / names.len();
            let mask = if bits == 32 { u32::MAX } else { (1 << bits) - 1 };
            let to: Vec<usize> = names
                .iter()
                .map(|name| if name == "_" { Ok(self.new_word()) } else { self.word(name) })
                .collect::<Result<_, _>>()?;
            let wide = of.bits == 64;
            let from = if wide { self.long(from)? } else { self.word(from)? };
            return Ok(run!(|w, m| {
                let all: Longs = if wide { w.longs[from] } else { w.words[from].map(u64::from) };
                for (i, &d) in to.iter().enumerate() {
                    let part = all.map(|x| (x >> (bits * i)) as u32 & mask);
                    w.set_words(d, m, &part);
                }
            }));
        }
        if from.starts_with('{') {
            let names = pieces(from);
            let bits = of.bits / names.len();
            let mask = if bits == 32 { u32::MAX } else { (1 << bits) - 1 };
            let from: Vec<usize> =
                names.iter().map(|name| self.word(name)).collect::<Result<_, _>>()?;
            let wide = of.bits == 64;
            let to = if wide { self.long(to)? } else { self.word(to)? };
            return Ok(run!(|w, m| {
                let mut all: Longs = [0; 32];
                for (i, &a) in from.iter().enumerate() {
                    for (all, &part) in all.iter_mut().zip(&w.words[a]) {
                        *all |= u64::from(part & mask) << (bits * i);
                    }
                }
                if wide {
                    w.set_longs(to, m, &all);
                } else {
                    w.set_words(to, m, &all.map(|x| x as u32));
                }
            }));
        }
        let place = self.dynamic_shared(from);
        if of.bits == 64 {
            let d = self.long(to)?;
            let a = match place {
                Some(place) => self.long_constant(place),
                None => self.long(from)?,
            };
            return Ok(l1(d, a, |x| x));
        }
        let d = self.word(to)?;
        let a = match place {
            Some(place) => self.constant(place as u32),
            None => self.word(from)?,
        };
        Ok(w1(d, a, |x| x))
    }

    /// Where `[name + offset]` is.
    fn address(&mut self, text: &str, space: Space) -> Result<(Space, Base, u64), String> {
        let inner = text.trim_start_matches('[').trim_end_matches(']').trim();
        let (name, offset) = match inner.split_once('+') {
            Some((name, offset)) => (name.trim(), number(offset).ok_or("what offset?")?),
            None => (inner, 0),
        };
        if let Some(offset) = number(name) {
            return Ok((space, Base::None, offset));
        }
        match self.look_up(name) {
            Some(Item::Word(register)) => Ok((space, Base::Word(register), offset)),
            Some(Item::Long(register)) => Ok((space, Base::Long(register), offset)),
            Some(Item::Variable(own, first)) => Ok((own, Base::None, first.wrapping_add(offset))),
            _ => match self.dynamic_shared(name) {
                Some(first) => Ok((Space::Shared, Base::None, first + offset)),
                None => Err(format!("what is {name}?")),
            },
        }
    }

    /// Where the shared memory begins of which the launch says how much there is, if that is its name: after all
    /// other. Such a kernel declares nothing after it has used it.
    fn dynamic_shared(&self, name: &str) -> Option<u64> {
        let mut all = self.parts.shared.iter();
        let is_it = all.any(|variable| variable.bytes == 0 && variable.name == name);
        is_it.then(|| self.code.shared.next_multiple_of(16) as u64)
    }

    fn space(parts: &[&str]) -> Space {
        for part in &parts[1..] {
            match *part {
                "global" | "const" => return Space::Global,
                part if part.starts_with("shared") => return Space::Shared,
                "local" => return Space::Local,
                "param" => return Space::Parameter,
                _ => {}
            }
        }
        Space::Generic
    }

    /// The registers of `{a, b}` or `a`, and whether they are long.
    fn registers(&mut self, text: &str, bits: usize) -> Result<Vec<(usize, bool)>, String> {
        let names = operands(text.trim_start_matches('{').trim_end_matches('}'));
        names
            .iter()
            .map(|name| match self.look_up(name) {
                Some(Item::Word(register)) => Ok((register, false)),
                Some(Item::Long(register)) => Ok((register, true)),
                _ if name == "_" && bits == 64 => Ok((self.new_long(), true)),
                _ if name == "_" => Ok((self.new_word(), false)),
                _ if bits == 64 => Ok((self.long(name)?, true)),
                _ => Ok((self.word(name)?, false)),
            })
            .collect()
    }

    fn load(&mut self, parts: &[&str], of: Type, arguments: &[String]) -> Result<Run, String> {
        let to = self.registers(&arguments[0], of.bits)?;
        let (space, base, offset) = self.address(&arguments[1], Self::space(parts))?;
        let bytes = of.bits / 8;
        let whole = bytes * to.len();
        let signed = of.is_signed();
        // The usual ones.
        if let [(d, false)] = to[..]
            && bytes == 4
        {
            return Ok(run!(|w, m| {
                let from = w.find_all(space, m, &addresses(w, base, offset), 4)?;
                let to = &mut w.words[d];
                // SAFETY: found and aligned.
                for_each(m, |lane| to[lane] = unsafe { from[lane].cast::<u32>().read() });
            }));
        }
        Ok(run!(|w, m| {
            let from = w.find_all(space, m, &addresses(w, base, offset), whole)?;
            for (i, &(d, is_long)) in to.iter().enumerate() {
                // SAFETY: found, all of it, and aligned.
                let value = |lane: usize| unsafe { read(from[lane].add(i * bytes), bytes) };
                let value = |lane| if signed { extend(value(lane), of.bits) } else { value(lane) };
                if is_long {
                    let to = &mut w.longs[d];
                    for_each(m, |lane| to[lane] = value(lane));
                } else {
                    let to = &mut w.words[d];
                    for_each(m, |lane| to[lane] = value(lane) as u32);
                }
            }
        }))
    }

    fn store(&mut self, parts: &[&str], of: Type, arguments: &[String]) -> Result<Run, String> {
        let from = self.registers(&arguments[1], of.bits)?;
        let (space, base, offset) = self.address(&arguments[0], Self::space(parts))?;
        let bytes = of.bits / 8;
        let whole = bytes * from.len();
        Ok(run!(|w, m| {
            let to = w.find_all(space, m, &addresses(w, base, offset), whole)?;
            for (i, &(a, is_long)) in from.iter().enumerate() {
                // SAFETY: found, all of it, and aligned.
                let put =
                    |lane: usize, value| unsafe { write(to[lane].add(i * bytes), bytes, value) };
                if is_long {
                    let from = &w.longs[a];
                    for_each(m, |lane| put(lane, from[lane]));
                } else {
                    let from = &w.words[a];
                    for_each(m, |lane| put(lane, from[lane].into()));
                }
            }
        }))
    }

    fn atomic(&mut self, parts: &[&str], arguments: &[String]) -> Result<Run, String> {
        const KINDS: [&str; 10] =
            ["add", "max", "min", "cas", "exch", "and", "or", "xor", "inc", "dec"];
        let kind = parts[1..].iter().find_map(|part| KINDS.iter().find(|kind| *kind == part));
        let kind = *kind.ok_or("how?")?;
        let of = parts.iter().rev().find_map(|part| Type::parse(part)).ok_or("of what type?")?;
        let result = parts[0] == "atom";
        let rest = &arguments[usize::from(result)..];
        let (space, base, offset) = self.address(&rest[0], Self::space(parts))?;
        let mut operands = Vec::new();
        for text in &rest[1..] {
            operands.extend(self.registers(text, of.bits)?);
        }
        let to = if result { self.registers(&arguments[0], of.bits)? } else { Vec::new() };
        let bytes = of.bits / 8;
        let change: Box<dyn Fn(u64, u64, u64) -> u64 + Send + Sync> = match (kind, of.kind, of.bits)
        {
            ("add", Kind::Float, 32) => {
                Box::new(|x, y, _| u64::from((f(x as u32) + f(y as u32)).to_bits()))
            }
            ("add", Kind::Float, 64) => Box::new(|x, y, _| (d(x) + d(y)).to_bits()),
            ("add", Kind::Float, 16) => Box::new(|x, y, _| {
                u64::from(float::to_f16(float::from_f16(x as u32) + float::from_f16(y as u32)))
            }),
            ("add", Kind::Bf, 16) => Box::new(|x, y, _| {
                u64::from(float::to_bf16(float::from_bf16(x as u32) + float::from_bf16(y as u32)))
            }),
            ("add", _, _) => Box::new(|x, y, _| x.wrapping_add(y)),
            ("max" | "min", Kind::Unsigned, _) => {
                let most = kind == "max";
                Box::new(move |x, y, _| if most { x.max(y) } else { x.min(y) })
            }
            ("max" | "min", Kind::Signed, bits) => {
                let most = kind == "max";
                Box::new(move |x, y, _| {
                    let (x, y) = (extend(x, bits) as i64, extend(y, bits) as i64);
                    (if most { x.max(y) } else { x.min(y) }) as u64
                })
            }
            ("cas", _, _) => Box::new(|x, y, z| if x == y { z } else { x }),
            ("exch", _, _) => Box::new(|_, y, _| y),
            ("and", _, _) => Box::new(|x, y, _| x & y),
            ("or", _, _) => Box::new(|x, y, _| x | y),
            ("xor", _, _) => Box::new(|x, y, _| x ^ y),
            ("inc", _, _) => Box::new(|x, y, _| if x >= y { 0 } else { x + 1 }),
            ("dec", _, _) => Box::new(|x, y, _| if x == 0 || x > y { y } else { x - 1 }),
            _ => return Err("not known".to_owned()),
        };
        Ok(run!(|w, m| {
            let places = w.find_all(space, m, &addresses(w, base, offset), bytes)?;
            for lane in lanes(m) {
                let place = places[lane];
                let value = |w: &Warp<'_>, i: usize| {
                    operands.get(i).map_or(0, |&(a, is_long)| {
                        if is_long {
                            w.longs[a][lane]
                        } else {
                            truncate(w.words[a][lane].into(), 8 * bytes)
                        }
                    })
                };
                // SAFETY: found and aligned; the device does one thing at a time.
                let old = unsafe { read(place, bytes) };
                let new = change(old, value(w, 0), value(w, 1));
                // SAFETY: as above.
                unsafe { write(place, bytes, new) };
                match to.first() {
                    Some(&(d, true)) => w.longs[d][lane] = old,
                    Some(&(d, false)) => w.words[d][lane] = old as u32,
                    None => {}
                }
            }
        }))
    }

    fn generic(&mut self, parts: &[&str], arguments: &[String]) -> Result<Run, String> {
        let window = Self::space(parts).window();
        let back = parts[1] == "to";
        let [d, a] = self.longs(arguments)?;
        Ok(l1(d, a, move |x| if back { x.wrapping_sub(window) } else { x.wrapping_add(window) }))
    }

    fn shuffle(&mut self, parts: &[&str], arguments: &[String]) -> Result<Run, String> {
        let (to, is_valid) = match arguments[0].split_once('|') {
            Some((to, is_valid)) => {
                (self.word(to.trim())?, Some(self.predicate(is_valid.trim())?.0))
            }
            None => (self.word(&arguments[0])?, None),
        };
        let [a, b, c] = self.words(&arguments[1..])?;
        let kind = *parts
            .iter()
            .find(|part| ["bfly", "up", "down", "idx"].contains(part))
            .ok_or("how?")?;
        let kind =
            ["bfly", "up", "down", "idx"].iter().position(|known| *known == kind).unwrap_or(0);
        Ok(run!(|w, m| {
            let (values, by, limits) = (w.words[a], w.words[b], w.words[c]);
            let mut valid = 0;
            let given: Words = std::array::from_fn(|lane| {
                let lane = lane as u32;
                let (by, limit) = (by[lane as usize] & 31, limits[lane as usize] & 31);
                let own = limits[lane as usize] >> 8 & 31;
                let most = lane & own | limit & !own;
                let least = lane & own;
                let (from, is_in) = match kind {
                    0 => (lane ^ by, lane ^ by <= most),
                    1 => (lane.wrapping_sub(by), lane as i32 - by as i32 >= most as i32),
                    2 => (lane + by, lane + by <= most),
                    _ => (least | by & !own, (least | by & !own) <= most),
                };
                valid |= u32::from(is_in) << lane;
                values[if is_in { from as usize & 31 } else { lane as usize }]
            });
            w.set_words(to, m, &given);
            if let Some(p) = is_valid {
                w.set_predicate(p, m, valid);
            }
        }))
    }

    fn test(&mut self, how: &str, of: Type, arguments: &[String]) -> Result<Test, String> {
        if of.bits == 64 {
            let [a, b] = self.longs(arguments)?;
            return Ok(match of.kind {
                Kind::Float => comparison!(longs_test, how, a, b, d),
                Kind::Signed => comparison!(longs_test, how, a, b, |x| x as i64),
                _ => comparison!(longs_test, how, a, b, |x| x),
            });
        }
        let [a, b] = self.words(arguments)?;
        Ok(match (of.kind, of.bits) {
            (Kind::Float, 32) => comparison!(words_test, how, a, b, f),
            (Kind::Float, 16) => comparison!(words_test, how, a, b, float::from_f16),
            (Kind::Bf, 16) => comparison!(words_test, how, a, b, float::from_bf16),
            (Kind::Signed, 32) => comparison!(words_test, how, a, b, |x| x as i32),
            (Kind::Signed, 16) => comparison!(words_test, how, a, b, |x| x as i16),
            (_, 16) => comparison!(words_test, how, a, b, |x| x as u16),
            (_, 32) => comparison!(words_test, how, a, b, |x| x),
            _ => return Err("not known".to_owned()),
        })
    }

    fn set_predicate(
        &mut self,
        parts: &[&str],
        of: Type,
        arguments: &[String],
    ) -> Result<Run, String> {
        let how = *parts[1..].iter().find(|part| COMPARISONS.contains(part)).ok_or("how?")?;
        let test = self.test(how, of, arguments.get(1..3).ok_or("too few operands")?)?;
        let (first, second) = match arguments[0].split_once('|') {
            Some((first, second)) => {
                (self.predicate(first.trim())?.0, Some(self.predicate(second.trim())?.0))
            }
            None => (self.predicate(&arguments[0])?.0, None),
        };
        let joined = parts[1..].iter().find_map(|part| match *part {
            "and" => Some(0),
            "or" => Some(1),
            "xor" => Some(2),
            _ => None,
        });
        let with = match (joined, arguments.get(3)) {
            (Some(joined), Some(text)) => Some((joined, self.predicate(text)?)),
            (None, None) => None,
            _ => return Err("not known".to_owned()),
        };
        Ok(run!(|w, m| {
            let holds = test(w);
            let join = |holds: u32, w: &Warp<'_>| match with {
                None => holds,
                Some((joined, (c, negated))) => {
                    let c = if negated { !w.predicates[c] } else { w.predicates[c] };
                    match joined {
                        0 => holds & c,
                        1 => holds | c,
                        _ => holds ^ c,
                    }
                }
            };
            let (yes, no) = (join(holds, w), join(!holds, w));
            w.set_predicate(first, m, yes);
            if let Some(second) = second {
                w.set_predicate(second, m, no);
            }
        }))
    }

    /// Sums with a carry from one to the next.
    fn carried(&mut self, parts: &[&str], of: Type, arguments: &[String]) -> Result<Run, String> {
        if of.bits != 32 {
            return Err("carries are known in 32 bits only".to_owned());
        }
        let (keeps, takes) = (parts.contains(&"cc"), matches!(parts[0], "addc" | "subc" | "madc"));
        let subtracts = parts[0].starts_with("sub");
        let (d, a, b, c) = if parts[0].starts_with("mad") {
            let [d, a, b, c] = self.words(arguments)?;
            (d, a, b, Some(c))
        } else {
            let [d, a, b] = self.words(arguments)?;
            (d, a, b, None)
        };
        let (high, signed) = (parts.contains(&"hi"), of.is_signed());
        Ok(run!(|w, m| {
            let mut carry = 0;
            let to: Words = std::array::from_fn(|i| {
                let (x, y) = (w.words[a][i], w.words[b][i]);
                let (x, y) = match c {
                    None => (x, y),
                    Some(c) => {
                        let product = if signed {
                            (i64::from(x as i32) * i64::from(y as i32)) as u64
                        } else {
                            u64::from(x) * u64::from(y)
                        };
                        (if high { (product >> 32) as u32 } else { product as u32 }, w.words[c][i])
                    }
                };
                let given = u64::from(takes && w.carry >> i & 1 == 1);
                let sum = if subtracts {
                    u64::from(x).wrapping_sub(u64::from(y)).wrapping_sub(given)
                } else {
                    u64::from(x) + u64::from(y) + given
                };
                carry |= u32::from(sum >> 32 != 0) << i;
                sum as u32
            });
            w.set_words(d, m, &to);
            if keeps {
                w.carry = w.carry & !m | carry & m;
            }
        }))
    }

    fn integer(&mut self, parts: &[&str], of: Type, arguments: &[String]) -> Result<Run, String> {
        let op = parts[0];
        let signed = of.is_signed();
        let has = |word: &str| parts.contains(&word);
        if of.kind == Kind::Predicate {
            let (to, _) = self.predicate(&arguments[0])?;
            let (a, a_not) = self.predicate(&arguments[1])?;
            let (b, b_not) =
                arguments.get(2).map_or(Ok((a, a_not)), |text| self.predicate(text))?;
            let which = ["and", "or", "xor", "not"]
                .iter()
                .position(|known| *known == op)
                .ok_or("not known")?;
            return Ok(run!(|w, m| {
                let x = if a_not { !w.predicates[a] } else { w.predicates[a] };
                let y = if b_not { !w.predicates[b] } else { w.predicates[b] };
                let value = match which {
                    0 => x & y,
                    1 => x | y,
                    2 => x ^ y,
                    _ => !x,
                };
                w.set_predicate(to, m, value);
            }));
        }
        // From 32 bits to 64, and from 16 to 32.
        if has("wide") {
            let of_word = move |x: u32| match (of.bits, signed) {
                (32, true) => i64::from(x as i32),
                (32, false) => i64::from(x),
                (_, true) => i64::from(x as i16),
                (_, false) => i64::from(x as u16),
            };
            let [a, b] = self.words(&arguments[1..])?;
            if of.bits == 16 {
                let to = self.word(&arguments[0])?;
                if op == "mul" {
                    return Ok(w2(to, a, b, move |x, y| {
                        of_word(x).wrapping_mul(of_word(y)) as u32
                    }));
                }
                let c = self.word(&arguments[3])?;
                return Ok(w3(to, [a, b, c], move |x, y, z| {
                    (of_word(x).wrapping_mul(of_word(y)) as u32).wrapping_add(z)
                }));
            }
            let to = self.long(&arguments[0])?;
            if op == "mul" {
                return Ok(w2l(to, a, b, move |x, y| of_word(x).wrapping_mul(of_word(y)) as u64));
            }
            let c = self.long(&arguments[3])?;
            return Ok(run!(|w, m| {
                let values = std::array::from_fn(|i| {
                    let product = of_word(w.words[a][i]).wrapping_mul(of_word(w.words[b][i]));
                    (product as u64).wrapping_add(w.longs[c][i])
                });
                w.set_longs(to, m, &values);
            }));
        }
        if of.bits == 64 {
            return self.long_integer(op, signed, has("hi"), arguments);
        }
        // Numbers of 16 bits are those of 32 with nothing, or with their sign, above.
        let narrow = of.bits == 16;
        let own = move |x: u32| match (narrow, signed) {
            (false, _) => x,
            (true, true) => short(x) as u32,
            (true, false) => x & 0xffff,
        };
        if matches!(op, "mad" | "sad") {
            let [to, a, b, c] = self.words(arguments)?;
            return Ok(match (op, has("hi")) {
                ("mad", false) => w3(to, [a, b, c], |x, y, z| x.wrapping_mul(y).wrapping_add(z)),
                ("mad", true) if !narrow => {
                    w3(to, [a, b, c], move |x, y, z| high(x, y, signed).wrapping_add(z))
                }
                _ => return Err("not known".to_owned()),
            });
        }
        if matches!(op, "abs" | "neg" | "not" | "cnot") {
            let [to, a] = self.words(arguments)?;
            return Ok(match op {
                "abs" => w1(to, a, move |x| (own(x) as i32).wrapping_abs() as u32),
                "neg" => w1(to, a, |x| x.wrapping_neg()),
                "not" => w1(to, a, |x| !x),
                _ => w1(to, a, move |x| u32::from(own(x) == 0)),
            });
        }
        let [to, a, b] = self.words(arguments)?;
        let most = of.bits as u32;
        Ok(match op {
            "add" => w2(to, a, b, u32::wrapping_add),
            "sub" => w2(to, a, b, u32::wrapping_sub),
            "mul" | "mul24" if !has("hi") => w2(to, a, b, u32::wrapping_mul),
            "mul" if !narrow => w2(to, a, b, move |x, y| high(x, y, signed)),
            "and" => w2(to, a, b, |x, y| x & y),
            "or" => w2(to, a, b, |x, y| x | y),
            "xor" => w2(to, a, b, |x, y| x ^ y),
            "shl" => w2(to, a, b, move |x, y| if y >= most { 0 } else { x << y }),
            "shr" if signed => w2(to, a, b, move |x, y| (own(x) as i32 >> y.min(31)) as u32),
            "shr" => w2(to, a, b, move |x, y| if y >= most { 0 } else { own(x) >> y }),
            "min" if signed => w2(to, a, b, move |x, y| (own(x) as i32).min(own(y) as i32) as u32),
            "max" if signed => w2(to, a, b, move |x, y| (own(x) as i32).max(own(y) as i32) as u32),
            "min" => w2(to, a, b, move |x, y| own(x).min(own(y))),
            "max" => w2(to, a, b, move |x, y| own(x).max(own(y))),
            "div" if signed => w2(to, a, b, move |x, y| {
                if own(y) == 0 {
                    u32::MAX
                } else {
                    (own(x) as i32).wrapping_div(own(y) as i32) as u32
                }
            }),
            "div" => w2(to, a, b, move |x, y| own(x).checked_div(own(y)).unwrap_or(u32::MAX)),
            "rem" if signed => w2(to, a, b, move |x, y| {
                if own(y) == 0 {
                    u32::MAX
                } else {
                    (own(x) as i32).wrapping_rem(own(y) as i32) as u32
                }
            }),
            "rem" => w2(to, a, b, move |x, y| own(x).checked_rem(own(y)).unwrap_or(u32::MAX)),
            _ => return Err("not known".to_owned()),
        })
    }

    fn long_integer(
        &mut self,
        op: &str,
        signed: bool,
        is_high: bool,
        arguments: &[String],
    ) -> Result<Run, String> {
        if matches!(op, "shl" | "shr") {
            let [to, a] = self.longs(arguments)?;
            let b = self.word(&arguments[2])?;
            return Ok(match (op, signed) {
                ("shl", _) => lwl(to, a, b, |x, y| if y >= 64 { 0 } else { x << y }),
                (_, true) => lwl(to, a, b, |x, y| (x as i64 >> y.min(63)) as u64),
                _ => lwl(to, a, b, |x, y| if y >= 64 { 0 } else { x >> y }),
            });
        }
        if matches!(op, "abs" | "neg" | "not") {
            let [to, a] = self.longs(arguments)?;
            return Ok(match op {
                "abs" => l1(to, a, |x| (x as i64).wrapping_abs() as u64),
                "neg" => l1(to, a, |x| x.wrapping_neg()),
                _ => l1(to, a, |x| !x),
            });
        }
        let high = move |x: u64, y: u64| {
            if signed {
                ((i128::from(x as i64) * i128::from(y as i64)) >> 64) as u64
            } else {
                ((u128::from(x) * u128::from(y)) >> 64) as u64
            }
        };
        if op == "mad" {
            let [to, a, b, c] = self.longs(arguments)?;
            return Ok(if is_high {
                l3(to, [a, b, c], move |x, y, z| high(x, y).wrapping_add(z))
            } else {
                l3(to, [a, b, c], |x, y, z| x.wrapping_mul(y).wrapping_add(z))
            });
        }
        let [to, a, b] = self.longs(arguments)?;
        Ok(match op {
            "add" => l2(to, a, b, u64::wrapping_add),
            "sub" => l2(to, a, b, u64::wrapping_sub),
            "mul" if is_high => l2(to, a, b, high),
            "mul" => l2(to, a, b, u64::wrapping_mul),
            "and" => l2(to, a, b, |x, y| x & y),
            "or" => l2(to, a, b, |x, y| x | y),
            "xor" => l2(to, a, b, |x, y| x ^ y),
            "min" if signed => l2(to, a, b, |x, y| (x as i64).min(y as i64) as u64),
            "max" if signed => l2(to, a, b, |x, y| (x as i64).max(y as i64) as u64),
            "min" => l2(to, a, b, u64::min),
            "max" => l2(to, a, b, u64::max),
            "div" if signed => l2(to, a, b, |x, y| {
                if y == 0 { u64::MAX } else { (x as i64).wrapping_div(y as i64) as u64 }
            }),
            "div" => l2(to, a, b, |x, y| x.checked_div(y).unwrap_or(u64::MAX)),
            "rem" if signed => l2(to, a, b, |x, y| {
                if y == 0 { u64::MAX } else { (x as i64).wrapping_rem(y as i64) as u64 }
            }),
            "rem" => l2(to, a, b, |x, y| x.checked_rem(y).unwrap_or(u64::MAX)),
            _ => return Err("not known".to_owned()),
        })
    }

    fn float(&mut self, parts: &[&str], of: Type, arguments: &[String]) -> Result<Run, String> {
        let op = parts[0];
        let mode = Mode::of(parts);
        let flush = parts.contains(&"ftz");
        let unclear = parts.iter().any(|part| matches!(*part, "sat" | "NaN" | "xorsign" | "relu"));
        if unclear && !matches!(op, "min" | "max") {
            return Err("not known".to_owned());
        }
        let keeps_nan = parts.contains(&"NaN");
        let z = move |x: u32| if flush { float::flush(f(x)) } else { f(x) };
        let end = move |x: f32| (if flush { float::flush(x) } else { x }).to_bits();
        match (of.kind, of.bits) {
            (Kind::Float, 32) => {
                let one = matches!(
                    op,
                    "neg"
                        | "abs"
                        | "rcp"
                        | "sqrt"
                        | "rsqrt"
                        | "ex2"
                        | "lg2"
                        | "sin"
                        | "cos"
                        | "tanh"
                );
                if one {
                    let [to, a] = self.words(arguments)?;
                    return Ok(match op {
                        "neg" => w1(to, a, move |x| end(-z(x))),
                        "abs" => w1(to, a, move |x| end(z(x).abs())),
                        "rcp" => w1(to, a, move |x| end(1. / z(x))),
                        "sqrt" => w1(to, a, move |x| end(z(x).sqrt())),
                        "rsqrt" => w1(to, a, move |x| end((1. / f64::from(z(x)).sqrt()) as f32)),
                        "ex2" => w1(to, a, move |x| end(f64::from(z(x)).exp2() as f32)),
                        "lg2" => w1(to, a, move |x| end(f64::from(z(x)).log2() as f32)),
                        "sin" => w1(to, a, move |x| end(f64::from(z(x)).sin() as f32)),
                        "cos" => w1(to, a, move |x| end(f64::from(z(x)).cos() as f32)),
                        _ => w1(to, a, move |x| end(f64::from(z(x)).tanh() as f32)),
                    });
                }
                if matches!(op, "fma" | "mad") {
                    let [to, a, b, c] = self.words(arguments)?;
                    return Ok(match (mode, flush) {
                        (Mode::Nearest, false) => {
                            w3(to, [a, b, c], |x, y, v| f(x).mul_add(f(y), f(v)).to_bits())
                        }
                        _ => w3(to, [a, b, c], move |x, y, v| {
                            end(float::fma(z(x), z(y), z(v), mode))
                        }),
                    });
                }
                let [to, a, b] = self.words(arguments)?;
                Ok(match (op, mode) {
                    ("add", Mode::Nearest) => w2(to, a, b, move |x, y| end(z(x) + z(y))),
                    ("sub", Mode::Nearest) => w2(to, a, b, move |x, y| end(z(x) - z(y))),
                    ("mul", Mode::Nearest) => w2(to, a, b, move |x, y| end(z(x) * z(y))),
                    ("add", _) => w2(to, a, b, move |x, y| end(float::fma(z(x), 1., z(y), mode))),
                    ("sub", _) => w2(to, a, b, move |x, y| end(float::fma(z(x), 1., -z(y), mode))),
                    ("mul", _) => w2(to, a, b, move |x, y| end(float::multiply(z(x), z(y), mode))),
                    ("div", Mode::Nearest) => w2(to, a, b, move |x, y| end(z(x) / z(y))),
                    ("min", _) => {
                        w2(to, a, b, move |x, y| end(float::least(z(x), z(y), keeps_nan)))
                    }
                    ("max", _) => w2(to, a, b, move |x, y| end(float::most(z(x), z(y), keeps_nan))),
                    ("copysign", _) => w2(to, a, b, |x, y| y & 0x7fff_ffff | x & 0x8000_0000),
                    _ => return Err("not known".to_owned()),
                })
            }
            (Kind::Float, 64) => {
                if matches!(op, "neg" | "abs" | "rcp" | "sqrt" | "rsqrt") {
                    let [to, a] = self.longs(arguments)?;
                    return Ok(match op {
                        "neg" => l1(to, a, |x| (-d(x)).to_bits()),
                        "abs" => l1(to, a, |x| d(x).abs().to_bits()),
                        "rcp" => l1(to, a, |x| (1. / d(x)).to_bits()),
                        "sqrt" => l1(to, a, |x| d(x).sqrt().to_bits()),
                        _ => l1(to, a, |x| (1. / d(x).sqrt()).to_bits()),
                    });
                }
                if matches!(op, "fma" | "mad") {
                    if mode != Mode::Nearest {
                        return Err("not known".to_owned());
                    }
                    let [to, a, b, c] = self.longs(arguments)?;
                    return Ok(l3(to, [a, b, c], |x, y, v| d(x).mul_add(d(y), d(v)).to_bits()));
                }
                let [to, a, b] = self.longs(arguments)?;
                Ok(match (op, mode) {
                    ("add", Mode::Nearest) => l2(to, a, b, |x, y| (d(x) + d(y)).to_bits()),
                    ("sub", Mode::Nearest) => l2(to, a, b, |x, y| (d(x) - d(y)).to_bits()),
                    ("mul", Mode::Nearest) => l2(to, a, b, |x, y| (d(x) * d(y)).to_bits()),
                    ("div", Mode::Nearest) => l2(to, a, b, |x, y| (d(x) / d(y)).to_bits()),
                    ("add", _) => {
                        l2(to, a, b, move |x, y| float::add_long(d(x), d(y), mode).to_bits())
                    }
                    ("min", _) => l2(to, a, b, |x, y| d(x).min(d(y)).to_bits()),
                    ("max", _) => l2(to, a, b, |x, y| d(x).max(d(y)).to_bits()),
                    ("copysign", _) => l2(to, a, b, |x, y| y & !(1 << 63) | x & 1 << 63),
                    _ => return Err("not known".to_owned()),
                })
            }
            (_, 16) => {
                let is_bf = of.kind == Kind::Bf;
                let from =
                    move |x: u32| if is_bf { float::from_bf16(x) } else { float::from_f16(x) };
                let back = move |x: f32| if is_bf { float::to_bf16(x) } else { float::to_f16(x) };
                if matches!(op, "neg" | "abs" | "ex2" | "tanh") {
                    let [to, a] = self.words(arguments)?;
                    return Ok(match op {
                        "neg" => w1(to, a, |x| x & 0xffff ^ 0x8000),
                        "abs" => w1(to, a, |x| x & 0x7fff),
                        "ex2" => w1(to, a, move |x| back(from(x).exp2())),
                        _ => w1(to, a, move |x| back(from(x).tanh())),
                    });
                }
                if op == "fma" {
                    let [to, a, b, c] = self.words(arguments)?;
                    return Ok(w3(to, [a, b, c], move |x, y, v| {
                        // Exact in f64, and so rounded twice at most where it can't matter.
                        let exact =
                            f64::from(from(x)).mul_add(f64::from(from(y)), f64::from(from(v)));
                        back(float::to_odd(exact))
                    }));
                }
                let [to, a, b] = self.words(arguments)?;
                Ok(match op {
                    "add" => w2(to, a, b, move |x, y| back(from(x) + from(y))),
                    "sub" => w2(to, a, b, move |x, y| back(from(x) - from(y))),
                    "mul" => w2(to, a, b, move |x, y| back(from(x) * from(y))),
                    "min" => {
                        w2(to, a, b, move |x, y| back(float::least(from(x), from(y), keeps_nan)))
                    }
                    "max" => {
                        w2(to, a, b, move |x, y| back(float::most(from(x), from(y), keeps_nan)))
                    }
                    _ => return Err("not known".to_owned()),
                })
            }
            _ => Err("not known".to_owned()),
        }
    }

    /// Two numbers of 16 bits in a word.
    fn packed(&mut self, parts: &[&str], of: &str, arguments: &[String]) -> Result<Run, String> {
        if parts.iter().any(|part| matches!(*part, "sat" | "NaN" | "relu" | "xorsign")) {
            return Err("not known".to_owned());
        }
        let is_bf = of == "bf16x2";
        let from = move |x: u32| if is_bf { float::from_bf16(x) } else { float::from_f16(x) };
        let back = move |x: f32| if is_bf { float::to_bf16(x) } else { float::to_f16(x) };
        let each = move |x: u32, y: u32, z: u32, make: fn(f32, f32, f32) -> f32| {
            let half = |at: u32| {
                let part = |x: u32| from(x >> at & 0xffff);
                back(make(part(x), part(y), part(z))) << at
            };
            half(16) | half(0)
        };
        let make: fn(f32, f32, f32) -> f32 = match parts[0] {
            "add" => |x, y, _| x + y,
            "sub" => |x, y, _| x - y,
            "mul" => |x, y, _| x * y,
            "min" => |x, y, _| float::least(x, y, false),
            "max" => |x, y, _| float::most(x, y, false),
            "fma" => |x, y, z| float::to_odd(f64::from(x).mul_add(f64::from(y), f64::from(z))),
            _ => return Err("not known".to_owned()),
        };
        if arguments.len() == 4 {
            let [to, a, b, c] = self.words(arguments)?;
            return Ok(w3(to, [a, b, c], move |x, y, z| each(x, y, z, make)));
        }
        let [to, a, b] = self.words(arguments)?;
        Ok(w2(to, a, b, move |x, y| each(x, y, 0, make)))
    }

    fn convert(
        &mut self,
        parts: &[&str],
        types: &[Type],
        arguments: &[String],
    ) -> Result<Run, String> {
        let mode = Mode::of(parts);
        let saturate = parts.contains(&"sat");
        // Two to one word, the first one above.
        if let Some(&packed) = parts.iter().find(|part| matches!(**part, "bf16x2" | "f16x2")) {
            if parts.last() != Some(&"f32") || parts.contains(&"relu") || mode != Mode::Nearest {
                return Err("not known".to_owned());
            }
            let [to, a, b] = self.words(arguments)?;
            let is_bf = packed == "bf16x2";
            let back = move |x: u32| if is_bf { float::to_bf16(f(x)) } else { float::to_f16(f(x)) };
            return Ok(w2(to, a, b, move |x, y| back(x) << 16 | back(y)));
        }
        let [to, from] = types else { return Err("between what types?".to_owned()) };
        let (to, from) = (*to, *from);
        if parts
            .iter()
            .any(|part| part.starts_with("e4m3") || part.starts_with("e5m2") || *part == "relu")
        {
            return Err("not known".to_owned());
        }
        let integral = parts.iter().any(|part| matches!(*part, "rni" | "rzi" | "rmi" | "rpi"));
        // The usual ones.
        match (to.kind, to.bits, from.kind, from.bits) {
            (Kind::Float, 64, Kind::Float, 32) if !saturate => {
                let (to, a) = (self.long(&arguments[0])?, self.word(&arguments[1])?);
                return Ok(wl(to, a, |x| f64::from(f(x)).to_bits()));
            }
            _ if to.is_float() || from.is_float() => {}
            _ if !saturate => {
                let signed = from.is_signed();
                let wide = move |x: u64| {
                    if signed { extend(x, from.bits) } else { truncate(x, from.bits) }
                };
                let own = move |x: u64| {
                    if to.is_signed() { extend(x, to.bits) } else { truncate(x, to.bits) }
                };
                let is_long = |this: &Self, text: &str, bits| {
                    matches!(this.look_up(text), Some(Item::Long(_))) || bits == 64
                };
                return match (
                    is_long(self, &arguments[0], to.bits),
                    is_long(self, &arguments[1], from.bits),
                ) {
                    (true, true) => {
                        let [to, a] = self.longs(arguments)?;
                        Ok(l1(to, a, move |x| own(wide(x))))
                    }
                    (true, false) => {
                        let (to, a) = (self.long(&arguments[0])?, self.word(&arguments[1])?);
                        Ok(wl(to, a, move |x| own(wide(x.into()))))
                    }
                    (false, true) => {
                        let (to, a) = (self.word(&arguments[0])?, self.long(&arguments[1])?);
                        Ok(lw(to, a, move |x| own(wide(x)) as u32))
                    }
                    (false, false) => {
                        let [to, a] = self.words(arguments)?;
                        Ok(w1(to, a, move |x| own(wide(x.into())) as u32))
                    }
                };
            }
            _ => return Err("not known".to_owned()),
        }
        let read: Box<dyn Fn(u64) -> Number + Send + Sync> = match (from.kind, from.bits) {
            (Kind::Float, 32) => Box::new(|x| Number::Float(f64::from(f(x as u32)))),
            (Kind::Float, 64) => Box::new(|x| Number::Float(d(x))),
            (Kind::Float, 16) => Box::new(|x| Number::Float(f64::from(float::from_f16(x as u32)))),
            (Kind::Bf, 16) => Box::new(|x| Number::Float(f64::from(float::from_bf16(x as u32)))),
            (Kind::Signed, bits) => {
                Box::new(move |x| Number::Integer(i128::from(extend(x, bits) as i64)))
            }
            (_, bits) => Box::new(move |x| Number::Integer(i128::from(truncate(x, bits)))),
        };
        let (signed, bits) = (to.is_signed(), to.bits);
        let write: Box<dyn Fn(Number) -> u64 + Send + Sync> = match (to.kind, to.bits) {
            (Kind::Float | Kind::Bf, _) => {
                let round = move |x: Number| match x {
                    Number::Float(x) if integral => mode.integral(x),
                    Number::Float(x) => x,
                    // Exact, or rounded to an odd one, which the next rounding takes as if it were exact.
                    Number::Integer(x) => float::from_integer(x, mode, bits),
                };
                let clamp = move |x: f64| if saturate { float::saturate(x) } else { x };
                match (to.kind, to.bits) {
                    (Kind::Float, 32) => {
                        Box::new(move |x| u64::from(float::narrow(clamp(round(x)), mode).to_bits()))
                    }
                    (Kind::Float, 64) => Box::new(move |x| clamp(round(x)).to_bits()),
                    (Kind::Float, 16) => {
                        Box::new(move |x| u64::from(float::to_f16(float::to_odd(clamp(round(x))))))
                    }
                    (Kind::Bf, 16) if mode == Mode::Nearest => {
                        Box::new(move |x| u64::from(float::to_bf16(float::to_odd(clamp(round(x))))))
                    }
                    _ => return Err("not known".to_owned()),
                }
            }
            _ => Box::new(move |x| {
                let (least, most) = if signed {
                    (-(1i128 << (bits - 1)), (1i128 << (bits - 1)) - 1)
                } else {
                    (0, (1i128 << bits) - 1)
                };
                let x = match x {
                    Number::Float(x) if x.is_nan() => 0,
                    Number::Float(x) => mode.integral(x) as i128,
                    Number::Integer(x) => x,
                };
                x.clamp(least, most) as u64
            }),
        };
        let (from_long, to_long) = (from.bits == 64, to.bits == 64);
        let a = if from_long { self.long(&arguments[1])? } else { self.word(&arguments[1])? };
        let d = if to_long { self.long(&arguments[0])? } else { self.word(&arguments[0])? };
        Ok(run!(|w, m| {
            let x: Longs = if from_long { w.longs[a] } else { w.words[a].map(u64::from) };
            let mut values: Longs = [0; 32];
            for lane in lanes(m) {
                values[lane] = write(read(x[lane]));
            }
            if to_long {
                w.set_longs(d, m, &values);
            } else {
                w.set_words(d, m, &values.map(|x| x as u32));
            }
        }))
    }
}

enum Number {
    Integer(i128),
    Float(f64),
}

/// Where each thread's access is.
fn addresses(w: &Warp<'_>, base: Base, offset: u64) -> Longs {
    match base {
        Base::None => [offset; 32],
        Base::Word(register) => w.words[register].map(|at| at.wrapping_add(offset as u32).into()),
        Base::Long(register) => w.longs[register].map(|at| at.wrapping_add(offset)),
    }
}

/// # Safety
///
/// There are as many bytes, aligned to their number.
unsafe fn read(from: *const u8, bytes: usize) -> u64 {
    unsafe {
        match bytes {
            1 => u64::from(from.read()),
            2 => u64::from(from.cast::<u16>().read()),
            4 => u64::from(from.cast::<u32>().read()),
            _ => from.cast::<u64>().read(),
        }
    }
}

/// # Safety
///
/// As [`read`].
unsafe fn write(to: *mut u8, bytes: usize, value: u64) {
    unsafe {
        match bytes {
            1 => to.write(value as u8),
            2 => to.cast::<u16>().write(value as u16),
            4 => to.cast::<u32>().write(value as u32),
            _ => to.cast::<u64>().write(value),
        }
    }
}

/// With its sign above.
fn extend(x: u64, bits: usize) -> u64 {
    let drop = 64 - bits;
    ((x << drop) as i64 >> drop) as u64
}

fn truncate(x: u64, bits: usize) -> u64 {
    if bits == 64 { x } else { x & ((1 << bits) - 1) }
}

fn high(x: u32, y: u32, signed: bool) -> u32 {
    if signed {
        ((i64::from(x as i32) * i64::from(y as i32)) >> 32) as u32
    } else {
        ((u64::from(x) * u64::from(y)) >> 32) as u32
    }
}
