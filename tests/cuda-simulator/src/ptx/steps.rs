//! Steps without jumps: which instruction is which, moves, tests, and what threads give each other.

use super::Run;
use super::decode::{Decoder, Kind, Type, number, operands};
use super::each::{Test, d, f, l1, longs_test, lw, run, w1, w3, words_test};
use super::lanes::{Longs, Warp, Words};
use super::rounding::Half;

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
    /// What a statement without jumps does.
    pub(super) fn step(&mut self, parts: &[&str], arguments: &[String]) -> Result<Run, String> {
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
                let test = self.test(parts, from, arguments)?;
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
                let p = self.condition(arguments.get(3).ok_or("too few operands")?)?;
                if of.bits == 64 {
                    let [d, a, b] = self.longs(arguments)?;
                    return Ok(run!(|w, m| {
                        let (x, y, p) = (&w.longs[a], &w.longs[b], w.holds(p));
                        let to = std::array::from_fn(|i| if p >> i & 1 == 1 { x[i] } else { y[i] });
                        w.set_longs(d, m, &to);
                    }));
                }
                let [d, a, b] = self.words(arguments)?;
                Ok(run!(|w, m| {
                    let (x, y, p) = (&w.words[a], &w.words[b], w.holds(p));
                    let to = std::array::from_fn(|i| if p >> i & 1 == 1 { x[i] } else { y[i] });
                    w.set_words(d, m, &to);
                }))
            }
            "shfl" => self.shuffle(parts, arguments),
            "vote" if has("ballot") => {
                let d = self.word(&arguments[0])?;
                let p = self.condition(&arguments[1])?;
                Ok(run!(|w, m| {
                    let votes = w.holds(p) & m;
                    w.set_words(d, m, &[votes; 32]);
                }))
            }
            "vote" if has("any") || has("all") => {
                let d = self.predicate(&arguments[0])?;
                let p = self.condition(&arguments[1])?;
                let all = has("all");
                Ok(run!(|w, m| {
                    let votes = w.holds(p) & m;
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
                Ok(w3(a[0], a[1], a[2], a[3], |x, y, which| {
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
                Ok(w3(a[0], a[1], a[2], a[3], move |x, at, len| {
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
                Ok(w3(a[0], a[1], a[2], a[3], move |low, high, by| {
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
                Ok(w3(a[0], a[1], a[2], a[3], move |x, y, z| {
                    (0..8).filter(|i| table >> i & 1 == 1).fold(0, |to, i| {
                        let of = |bit: u32, v: u32| if i >> bit & 1 == 1 { v } else { !v };
                        to | of(2, x) & of(1, y) & of(0, z)
                    })
                }))
            }
            _ if last == "bf16x2" => self.packed(parts, Half::Bf16, arguments),
            _ if last == "f16x2" => self.packed(parts, Half::F16, arguments),
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

    pub(super) fn moved(&mut self, of: Type, arguments: &[String]) -> Result<Run, String> {
        let [to, from] = arguments else { return Err("two operands".to_owned()) };
        let pieces = |text: &str| operands(text.trim_start_matches('{').trim_end_matches('}'));
        if of.kind == Kind::Predicate {
            let d = self.predicate(to)?;
            if let Some(value) = number(from) {
                let value = if value == 0 { 0 } else { u32::MAX };
                return Ok(run!(|w, m| w.set_predicate(d, m, value)));
            }
            let a = self.condition(from)?;
            return Ok(run!(|w, m| w.set_predicate(d, m, w.holds(a))));
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

    pub(super) fn shuffle(&mut self, parts: &[&str], arguments: &[String]) -> Result<Run, String> {
        let (to, is_valid) = match arguments[0].split_once('|') {
            Some((to, is_valid)) => (self.word(to.trim())?, Some(self.predicate(is_valid)?)),
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

    pub(super) fn test(
        &mut self,
        parts: &[&str],
        of: Type,
        arguments: &[String],
    ) -> Result<Test, String> {
        let how = *parts[1..].iter().find(|part| COMPARISONS.contains(part)).ok_or("how?")?;
        let arguments = arguments.get(1..3).ok_or("too few operands")?;
        if of.bits == 64 {
            let [a, b] = self.longs(arguments)?;
            return Ok(match of.kind {
                Kind::Float => comparison!(longs_test, how, a, b, d),
                Kind::Signed => comparison!(longs_test, how, a, b, |x| x as i64),
                _ => comparison!(longs_test, how, a, b, |x| x),
            });
        }
        let [a, b] = self.words(arguments)?;
        if let Some(half) = of.half() {
            return Ok(comparison!(words_test, how, a, b, move |x| half.read(x)));
        }
        Ok(match (of.kind, of.bits) {
            (Kind::Float, 32) => comparison!(words_test, how, a, b, f),
            (Kind::Signed, 32) => comparison!(words_test, how, a, b, |x| x as i32),
            (Kind::Signed, 16) => comparison!(words_test, how, a, b, |x| x as i16),
            (_, 16) => comparison!(words_test, how, a, b, |x| x as u16),
            (_, 32) => comparison!(words_test, how, a, b, |x| x),
            _ => return Err("not known".to_owned()),
        })
    }

    pub(super) fn set_predicate(
        &mut self,
        parts: &[&str],
        of: Type,
        arguments: &[String],
    ) -> Result<Run, String> {
        let test = self.test(parts, of, arguments)?;
        let (first, second) = match arguments[0].split_once('|') {
            Some((first, second)) => (self.predicate(first)?, Some(self.predicate(second)?)),
            None => (self.predicate(&arguments[0])?, None),
        };
        let joined = parts[1..].iter().find_map(|part| match *part {
            "and" => Some(0),
            "or" => Some(1),
            "xor" => Some(2),
            _ => None,
        });
        let with = match (joined, arguments.get(3)) {
            (Some(joined), Some(text)) => Some((joined, self.condition(text)?)),
            (None, None) => None,
            _ => return Err("not known".to_owned()),
        };
        Ok(run!(|w, m| {
            let holds = test(w);
            let join = |holds: u32, w: &Warp<'_>| match with {
                None => holds,
                Some((0, c)) => holds & w.holds(c),
                Some((1, c)) => holds | w.holds(c),
                Some((_, c)) => holds ^ w.holds(c),
            };
            let (yes, no) = (join(holds, w), join(!holds, w));
            w.set_predicate(first, m, yes);
            if let Some(second) = second {
                w.set_predicate(second, m, no);
            }
        }))
    }
}
