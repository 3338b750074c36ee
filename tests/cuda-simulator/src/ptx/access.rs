//! Loads, stores and atomics.

use super::Run;
use super::decode::{Decoder, Item, Kind, Type, number, operands};
use super::each::{d, extend, f, l1, run, truncate};
use super::lanes::{Longs, Space, Warp, for_each, lanes};

/// An address: a register or nothing, and what is added.
#[derive(Clone, Copy)]
enum Base {
    None,
    Word(usize),
    Long(usize),
}

impl Decoder<'_> {
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
    pub(super) fn dynamic_shared(&self, name: &str) -> Option<u64> {
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

    pub(super) fn load(
        &mut self,
        parts: &[&str],
        of: Type,
        arguments: &[String],
    ) -> Result<Run, String> {
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

    pub(super) fn store(
        &mut self,
        parts: &[&str],
        of: Type,
        arguments: &[String],
    ) -> Result<Run, String> {
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

    pub(super) fn atomic(&mut self, parts: &[&str], arguments: &[String]) -> Result<Run, String> {
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
            ("add", Kind::Float | Kind::Bf, 16) => {
                let half = of.half().ok_or("not known")?;
                let add = move |x, y| half.round(half.read(x) + half.read(y));
                Box::new(move |x, y, _| u64::from(add(x as u32, y as u32)))
            }
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

    pub(super) fn generic(&mut self, parts: &[&str], arguments: &[String]) -> Result<Run, String> {
        let window = Self::space(parts).window();
        let back = parts[1] == "to";
        let [d, a] = self.longs(arguments)?;
        Ok(l1(d, a, move |x| if back { x.wrapping_sub(window) } else { x.wrapping_add(window) }))
    }
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
