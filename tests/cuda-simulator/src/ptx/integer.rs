//! Arithmetic of integers.

use super::Run;
use super::decode::{Decoder, Kind, Type};
use super::each::{high, l1, l2, l3, lwl, run, short, w1, w2, w2l, w3};
use super::lanes::{Warp, Words};

impl Decoder<'_> {
    pub(super) fn integer(
        &mut self,
        parts: &[&str],
        of: Type,
        arguments: &[String],
    ) -> Result<Run, String> {
        let op = parts[0];
        let signed = of.is_signed();
        let has = |word: &str| parts.contains(&word);
        if of.kind == Kind::Predicate {
            let to = self.predicate(&arguments[0])?;
            let a = self.condition(&arguments[1])?;
            let b = arguments.get(2).map_or(Ok(a), |text| self.condition(text))?;
            let which = ["and", "or", "xor", "not"]
                .iter()
                .position(|known| *known == op)
                .ok_or("not known")?;
            return Ok(run!(|w, m| {
                let (x, y) = (w.holds(a), w.holds(b));
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
                return Ok(w3(to, a, b, c, move |x, y, z| {
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
                ("mad", false) => w3(to, a, b, c, |x, y, z| x.wrapping_mul(y).wrapping_add(z)),
                ("mad", true) if !narrow => {
                    w3(to, a, b, c, move |x, y, z| high(x, y, signed).wrapping_add(z))
                }
                _ => return Err("not known".to_owned()),
            });
        }
        if matches!(op, "abs" | "neg" | "not" | "cnot") {
            let [to, a] = self.words(arguments)?;
            return Ok(match op {
                "abs" => w1(to, a, move |x| (own(x) as i32).wrapping_abs() as u32),
                "neg" => w1(to, a, u32::wrapping_neg),
                "not" => w1(to, a, |x| !x),
                _ => w1(to, a, move |x| u32::from(own(x) == 0)),
            });
        }
        let [to, a, b] = self.words(arguments)?;
        let most = of.bits as u32;
        let divided = move |x: u32, y: u32, divide: fn(i32, i32) -> i32| {
            if own(y) == 0 { u32::MAX } else { divide(own(x) as i32, own(y) as i32) as u32 }
        };
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
            "div" if signed => w2(to, a, b, move |x, y| divided(x, y, i32::wrapping_div)),
            "div" => w2(to, a, b, move |x, y| own(x).checked_div(own(y)).unwrap_or(u32::MAX)),
            "rem" if signed => w2(to, a, b, move |x, y| divided(x, y, i32::wrapping_rem)),
            "rem" => w2(to, a, b, move |x, y| own(x).checked_rem(own(y)).unwrap_or(u32::MAX)),
            _ => return Err("not known".to_owned()),
        })
    }

    pub(super) fn long_integer(
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
                "neg" => l1(to, a, u64::wrapping_neg),
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
                l3(to, a, b, c, move |x, y, z| high(x, y).wrapping_add(z))
            } else {
                l3(to, a, b, c, |x, y, z| x.wrapping_mul(y).wrapping_add(z))
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

    /// Sums with a carry from one to the next.
    pub(super) fn carried(
        &mut self,
        parts: &[&str],
        of: Type,
        arguments: &[String],
    ) -> Result<Run, String> {
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
        let (is_high, signed) = (parts.contains(&"hi"), of.is_signed());
        Ok(run!(|w, m| {
            let mut carry = 0;
            let to: Words = std::array::from_fn(|i| {
                let (x, y) = (w.words[a][i], w.words[b][i]);
                let (x, y) = match c {
                    None => (x, y),
                    Some(c) => {
                        let part = if is_high { high(x, y, signed) } else { x.wrapping_mul(y) };
                        (part, w.words[c][i])
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
}
