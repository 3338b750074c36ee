//! Arithmetic of floats, and what turns numbers of one kind into another.

use super::Run;
use super::decode::{Decoder, Item, Kind, Type};
use super::each::{d, extend, f, l1, l2, l3, lw, run, truncate, w1, w2, w3, wl};
use super::lanes::{Longs, Warp, lanes};
use super::rounding::{self, Half, Mode};

impl Decoder<'_> {
    pub(super) fn float(
        &mut self,
        parts: &[&str],
        of: Type,
        arguments: &[String],
    ) -> Result<Run, String> {
        let op = parts[0];
        let mode = Mode::of(parts);
        let flush = parts.contains(&"ftz");
        let unclear = parts.iter().any(|part| matches!(*part, "sat" | "NaN" | "xorsign" | "relu"));
        if unclear && !matches!(op, "min" | "max") {
            return Err("not known".to_owned());
        }
        let keeps_nan = parts.contains(&"NaN");
        let z = move |x: u32| if flush { rounding::flush(f(x)) } else { f(x) };
        let end = move |x: f32| (if flush { rounding::flush(x) } else { x }).to_bits();
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
                            w3(to, a, b, c, |x, y, v| f(x).mul_add(f(y), f(v)).to_bits())
                        }
                        _ => w3(to, a, b, c, move |x, y, v| {
                            end(rounding::fma(z(x), z(y), z(v), mode))
                        }),
                    });
                }
                let [to, a, b] = self.words(arguments)?;
                Ok(match (op, mode) {
                    ("add", Mode::Nearest) => w2(to, a, b, move |x, y| end(z(x) + z(y))),
                    ("sub", Mode::Nearest) => w2(to, a, b, move |x, y| end(z(x) - z(y))),
                    ("mul", Mode::Nearest) => w2(to, a, b, move |x, y| end(z(x) * z(y))),
                    ("add", _) => {
                        w2(to, a, b, move |x, y| end(rounding::fma(z(x), 1., z(y), mode)))
                    }
                    ("sub", _) => {
                        w2(to, a, b, move |x, y| end(rounding::fma(z(x), 1., -z(y), mode)))
                    }
                    ("mul", _) => {
                        w2(to, a, b, move |x, y| end(rounding::multiply(z(x), z(y), mode)))
                    }
                    ("div", Mode::Nearest) => w2(to, a, b, move |x, y| end(z(x) / z(y))),
                    ("min", _) => {
                        w2(to, a, b, move |x, y| end(rounding::least(z(x), z(y), keeps_nan)))
                    }
                    ("max", _) => {
                        w2(to, a, b, move |x, y| end(rounding::most(z(x), z(y), keeps_nan)))
                    }
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
                    return Ok(l3(to, a, b, c, |x, y, v| d(x).mul_add(d(y), d(v)).to_bits()));
                }
                let [to, a, b] = self.longs(arguments)?;
                Ok(match (op, mode) {
                    ("add", Mode::Nearest) => l2(to, a, b, |x, y| (d(x) + d(y)).to_bits()),
                    ("sub", Mode::Nearest) => l2(to, a, b, |x, y| (d(x) - d(y)).to_bits()),
                    ("mul", Mode::Nearest) => l2(to, a, b, |x, y| (d(x) * d(y)).to_bits()),
                    ("div", Mode::Nearest) => l2(to, a, b, |x, y| (d(x) / d(y)).to_bits()),
                    ("add", _) => {
                        l2(to, a, b, move |x, y| rounding::add_long(d(x), d(y), mode).to_bits())
                    }
                    ("min", _) => l2(to, a, b, |x, y| d(x).min(d(y)).to_bits()),
                    ("max", _) => l2(to, a, b, |x, y| d(x).max(d(y)).to_bits()),
                    ("copysign", _) => l2(to, a, b, |x, y| y & !(1 << 63) | x & 1 << 63),
                    _ => return Err("not known".to_owned()),
                })
            }
            (_, 16) => {
                let half = of.half().ok_or("not known")?;
                let (from, back) = (move |x| half.read(x), move |x| half.round(x));
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
                    return Ok(w3(to, a, b, c, move |x, y, v| {
                        // Exact in f64, and so rounded twice at most where it can't matter.
                        let exact =
                            f64::from(from(x)).mul_add(f64::from(from(y)), f64::from(from(v)));
                        back(rounding::to_odd(exact))
                    }));
                }
                let [to, a, b] = self.words(arguments)?;
                Ok(match op {
                    "add" => w2(to, a, b, move |x, y| back(from(x) + from(y))),
                    "sub" => w2(to, a, b, move |x, y| back(from(x) - from(y))),
                    "mul" => w2(to, a, b, move |x, y| back(from(x) * from(y))),
                    "min" => {
                        w2(to, a, b, move |x, y| back(rounding::least(from(x), from(y), keeps_nan)))
                    }
                    "max" => {
                        w2(to, a, b, move |x, y| back(rounding::most(from(x), from(y), keeps_nan)))
                    }
                    _ => return Err("not known".to_owned()),
                })
            }
            _ => Err("not known".to_owned()),
        }
    }

    /// Two numbers of 16 bits in a word.
    pub(super) fn packed(
        &mut self,
        parts: &[&str],
        of: Half,
        arguments: &[String],
    ) -> Result<Run, String> {
        if parts.iter().any(|part| matches!(*part, "sat" | "NaN" | "relu" | "xorsign")) {
            return Err("not known".to_owned());
        }
        let each = move |x: u32, y: u32, z: u32, make: fn(f32, f32, f32) -> f32| {
            let half = |at: u32| {
                let part = |x: u32| of.read(x >> at & 0xffff);
                of.round(make(part(x), part(y), part(z))) << at
            };
            half(16) | half(0)
        };
        let make: fn(f32, f32, f32) -> f32 = match parts[0] {
            "add" => |x, y, _| x + y,
            "sub" => |x, y, _| x - y,
            "mul" => |x, y, _| x * y,
            "min" => |x, y, _| rounding::least(x, y, false),
            "max" => |x, y, _| rounding::most(x, y, false),
            "fma" => |x, y, z| rounding::to_odd(f64::from(x).mul_add(f64::from(y), f64::from(z))),
            _ => return Err("not known".to_owned()),
        };
        if arguments.len() == 4 {
            let [to, a, b, c] = self.words(arguments)?;
            return Ok(w3(to, a, b, c, move |x, y, z| each(x, y, z, make)));
        }
        let [to, a, b] = self.words(arguments)?;
        Ok(w2(to, a, b, move |x, y| each(x, y, 0, make)))
    }

    pub(super) fn convert(
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
            let of = if packed == "bf16x2" { Half::Bf16 } else { Half::F16 };
            return Ok(w2(to, a, b, move |x, y| of.round(f(x)) << 16 | of.round(f(y))));
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
            (Kind::Float | Kind::Bf, 16) => {
                let half = from.half().ok_or("not known")?;
                Box::new(move |x| Number::Float(f64::from(half.read(x as u32))))
            }
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
                    Number::Integer(x) => rounding::from_integer(x, mode, bits),
                };
                let clamp = move |x: f64| if saturate { rounding::saturate(x) } else { x };
                match (to.half(), to.bits) {
                    (None, 32) => Box::new(move |x| {
                        u64::from(rounding::narrow(clamp(round(x)), mode).to_bits())
                    }),
                    (None, 64) => Box::new(move |x| clamp(round(x)).to_bits()),
                    (Some(half), _) if half == Half::F16 || mode == Mode::Nearest => {
                        Box::new(move |x| u64::from(half.round(rounding::to_odd(clamp(round(x))))))
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
