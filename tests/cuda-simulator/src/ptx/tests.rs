use super::{Fault, Memory, Module};

/// The numbers of a test, and nothing else.
struct Only<'a>(Vec<&'a [u32]>);

impl Memory for Only<'_> {
    fn find(&self, address: u64, bytes: u64) -> Option<(u64, u64)> {
        let ranges = self.0.iter().map(|part| part.as_ptr_range());
        ranges
            .map(|range| (range.start as u64, range.end as u64))
            .find(|&(first, end)| address >= first && address + bytes <= end)
    }
}

/// Runs a kernel `k` of this body and these declarations, with the address of the numbers, which it may change, as
/// its only parameter.
fn try_run(
    around: &str,
    body: &str,
    blocks: u32,
    threads: u32,
    numbers: &mut [u32],
) -> Result<(), Fault> {
    let text = format!(
        ".version 9.0\n.target sm_90\n.address_size 64\n{around}\n
        .visible .entry k(.param .u64 k_param_0)\n{{\n.reg .pred %p<9>;\n.reg .b16 %rs<9>;\n.reg .b32 %r<99>;
        .reg .f32 %f<9>;\n.reg .b64 %rd<99>;\n.reg .f64 %fd<9>;\nld.param.u64 %rd0, [k_param_0];\n{body}\nret;\n}}"
    );
    let module = Module::parse(&text).unwrap();
    let kernel = module.kernel("k").unwrap().unwrap();
    assert_eq!(kernel.parameters(), [(0, 8)]);
    let parameters = (numbers.as_mut_ptr() as u64).to_ne_bytes();
    let memory = Only(vec![numbers]);
    kernel.run([blocks, 1, 1], [threads, 1, 1], 0, &parameters, &memory)
}

fn run(body: &str, blocks: u32, threads: u32, numbers: &mut [u32]) {
    try_run("", body, blocks, threads, numbers).unwrap();
}

/// What comes out of an instruction that takes %r1 to %r3 (or %f, as bits) to %r4, for one thread.
fn result(instructions: &str, given: [u32; 3]) -> u32 {
    let mut numbers = [given[0], given[1], given[2], 0];
    let body = format!(
        "ld.global.u32 %r1, [%rd0];\nld.global.u32 %r2, [%rd0+4];\nld.global.u32 %r3, [%rd0+8];
        mov.b32 %f1, %r1;\nmov.b32 %f2, %r2;\nmov.b32 %f3, %r3;\n{instructions}\nst.global.u32 [%rd0+12], %r4;"
    );
    run(&body, 1, 1, &mut numbers);
    numbers[3]
}

/// The same of floats, to %f4.
fn float(instruction: &str, given: [f32; 3]) -> f32 {
    let text = format!("{instruction}\nmov.b32 %r4, %f4;");
    f32::from_bits(result(&text, given.map(f32::to_bits)))
}

/// %r1 = the thread's number in the grid, %rd2 = where its number is.
const OWN: &str = "mov.u32 %r2, %ctaid.x;\nmov.u32 %r3, %ntid.x;\nmov.u32 %r4, %tid.x;
    mad.lo.s32 %r1, %r2, %r3, %r4;\nmul.wide.u32 %rd1, %r1, 4;\nadd.s64 %rd2, %rd0, %rd1;\n";

#[test]
fn threads_go_apart_and_come_together_again() {
    // Each thread goes around as often as its number says, over odd and even ways.
    let body = format!(
        "{OWN}mov.u32 %r5, 0;\nmov.u32 %r6, 0;\n$again:\nsetp.ge.u32 %p1, %r6, %r1;\n@%p1 bra $end;
        and.b32 %r7, %r6, 1;\nsetp.eq.s32 %p2, %r7, 0;\n@%p2 bra $even;\nadd.s32 %r5, %r5, 100;\nbra.uni $on;
        $even:\nadd.s32 %r5, %r5, 1;\n$on:\nadd.s32 %r6, %r6, 1;\nbra.uni $again;\n$end:
        activemask.b32 %r8;\npopc.b32 %r9, %r8;\nmad.lo.u32 %r5, %r9, 100000, %r5;\nst.global.u32 [%rd2], %r5;"
    );
    // Two warps in each block, the second one not whole.
    let mut numbers = [0; 80];
    run(&body, 2, 40, &mut numbers);
    for (i, number) in numbers.iter().enumerate() {
        let together = if i % 40 < 32 { 32 } else { 8 };
        assert_eq!(*number as usize, together * 100_000 + i.div_ceil(2) + i / 2 * 100, "{i}");
    }
}

#[test]
fn shared_memory_is_a_blocks_and_barriers_order_its_use() {
    let shared = ".shared .align 4 .b8 room[256];\n";
    let turn = |barrier: &str| {
        format!(
            "{shared}{OWN}ld.global.u32 %r5, [%rd2];\nmov.u32 %r6, room;\nshl.b32 %r7, %r4, 2;
            add.s32 %r8, %r6, %r7;\nst.shared.u32 [%r8], %r5;\n{barrier}\nsub.s32 %r9, %r6, %r7;
            ld.shared.u32 %r10, [%r9+252];\nst.global.u32 [%rd2], %r10;"
        )
    };
    let given: Vec<u32> = (0..128).collect();
    let expected: Vec<u32> = (0..64).rev().chain((64..128).rev()).collect();
    let mut numbers = given.clone();
    run(&turn("bar.sync 0;"), 2, 64, &mut numbers);
    assert_eq!(numbers, expected);
    // Without it, a warp does not see what the other has written; nothing is left of the block before.
    let mut numbers = given;
    run(&turn(""), 2, 64, &mut numbers);
    assert_eq!(numbers[..32], [u32::MAX; 32]);
    assert_eq!(numbers[64..96], [u32::MAX; 32]);
}

#[test]
fn warps_give_each_other_numbers() {
    let sum = "shfl.sync.bfly.b32 %r6|%p1, %r5, 16, 31, -1;\nadd.s32 %r5, %r5, %r6;\n";
    let sums: String =
        [16, 8, 4, 2, 1].map(|by| sum.replace("5, 16,", &format!("5, {by},"))).concat();
    let mut numbers = [0; 32];
    run(&format!("{OWN}mov.u32 %r5, %r1;\n{sums}st.global.u32 [%rd2], %r5;"), 1, 32, &mut numbers);
    assert_eq!(numbers, [496; 32]);
    let down = "shfl.sync.down.b32 %r6|%p1, %r1, 3, 31, -1;\nselp.b32 %r7, 1000, 0, %p1;\nadd.s32 %r6, %r6, %r7;\n";
    run(&format!("{OWN}{down}st.global.u32 [%rd2], %r6;"), 1, 32, &mut numbers);
    assert_eq!((numbers[0], numbers[28], numbers[29]), (1003, 1031, 29));
}

#[test]
fn parameters_may_be_indexed_at_run_time() {
    let text = ".version 9.0\n.visible .entry k(\n.param .align 8 .b8 k_param_0[32],\n.param .u64 k_param_1\n)
        .maxntid 32, 1, 1\n{\n.reg .b32 %r<9>;\n.reg .b64 %rd<9>;\nmov.b64 %rd1, k_param_0;
        ld.param.u64 %rd2, [k_param_1];\nmov.u32 %r1, %tid.x;\nmul.wide.u32 %rd3, %r1, 16;
        add.s64 %rd4, %rd1, %rd3;\nld.param.v2.u32 {%r2, %r3}, [%rd4+8];\nsub.s32 %r4, %r3, %r2;
        mul.wide.u32 %rd5, %r1, 4;\nadd.s64 %rd6, %rd2, %rd5;\nst.global.u32 [%rd6], %r4;\nret;\n}";
    let module = Module::parse(text).unwrap();
    let kernel = module.kernel("k").unwrap().unwrap();
    assert_eq!(kernel.parameters(), [(0, 32), (32, 8)]);
    let mut numbers = [0u32; 2];
    let mut parameters: Vec<u8> =
        [0u32, 0, 3, 10, 0, 0, 5, 25].iter().flat_map(|n| n.to_ne_bytes()).collect();
    parameters.extend((numbers.as_mut_ptr() as u64).to_ne_bytes());
    kernel.run([1; 3], [2, 1, 1], 0, &parameters, &Only(vec![&numbers])).unwrap();
    assert_eq!(numbers, [7, 20]);
    assert!(module.kernel("other").is_none());
}

#[test]
fn functions_get_their_parameters_and_give_results_back() {
    let twice = ".func (.param .b32 out) twice(.param .b32 twice_param_0)\n{\n.reg .b32 %r<3>;\n.reg .pred %p<2>;
        ld.param.u32 %r1, [twice_param_0];\nsetp.gt.u32 %p1, %r1, 40;\n@%p1 bra $L1;\nadd.s32 %r1, %r1, %r1;
        st.param.b32 [out+0], %r1;\nret;\n$L1:\nst.param.b32 [out+0], 7;\nret;\n}";
    let call = "{\n.param .b32 given;\nst.param.b32 [given+0], %r1;\n.param .b32 back;
        call.uni (back), twice, (given);\nld.param.b32 %r1, [back+0];\n}\n";
    let mut numbers = [0; 64];
    let body = format!("{OWN}{call}{call}st.global.u32 [%rd2], %r1;");
    try_run(twice, &body, 1, 64, &mut numbers).unwrap();
    let double = |x| if x > 40 { 7 } else { 2 * x };
    for (i, number) in (0..).zip(numbers) {
        assert_eq!(number, double(double(i)));
    }
}

#[test]
fn atomics_add_up_over_all_blocks() {
    let body = format!(
        "{OWN}atom.global.add.u32 %r5, [%rd0], %r1;\natom.global.max.u32 %r5, [%rd0+4], %r1;
        cvt.rn.f32.u32 %f1, %r1;\natom.global.add.f32 %f2, [%rd0+8], %f1;"
    );
    let mut numbers = [0; 3];
    run(&body, 3, 50, &mut numbers);
    assert_eq!(numbers, [149 * 75, 149, 11_175f32.to_bits()]);
}

#[test]
fn sums_and_products_are_rounded_as_they_say() {
    let tiny = 2f32.powi(-30);
    assert_eq!(float("add.rn.f32 %f4, %f1, %f2;", [1., tiny, 0.]), 1.);
    assert_eq!(float("add.rz.f32 %f4, %f1, %f2;", [1., -tiny, 0.]), 1f32.next_down());
    assert_eq!(float("add.rz.f32 %f4, %f1, %f2;", [-1., tiny, 0.]), -1f32.next_down());
    assert_eq!(float("add.rp.f32 %f4, %f1, %f2;", [1., tiny, 0.]), 1f32.next_up());
    // What is missing is below what an f64 tells apart from 1.
    assert_eq!(float("add.rm.f32 %f4, %f1, %f2;", [1., -(2f32.powi(-60)), 0.]), 1f32.next_down());
    let third = 1f32 / 3.;
    let exact = f64::from(third) * f64::from(third);
    let (below, above) = (float("mul.rm.f32 %f4, %f1, %f2;", [third, third, 0.]), third * third);
    assert!(f64::from(below) <= exact && (above.to_bits() - below.to_bits()) <= 1);
    assert_eq!(float("fma.rm.f32 %f4, %f1, %f2, %f3;", [3., 5., -tiny]), 15f32.next_down());
    assert_eq!(
        float("fma.rn.f32 %f4, %f1, %f2, %f3;", [1. + 2f32.powi(-12), 1. - 2f32.powi(-12), -1.]),
        -(2f32.powi(-24))
    );
    assert_eq!(float("add.rz.f32 %f4, %f1, %f2;", [f32::MAX, f32::MAX, 0.]), f32::MAX);
    let small = f32::from_bits(1);
    assert_eq!(float("add.f32 %f4, %f1, %f2;", [small, 0., 0.]), small);
    assert_eq!(float("add.ftz.f32 %f4, %f1, %f2;", [small, 0., 0.]), 0.);
    assert_eq!(float("min.f32 %f4, %f1, %f2;", [f32::NAN, 2., 0.]), 2.);
    assert!(float("max.NaN.f32 %f4, %f1, %f2;", [f32::NAN, 2., 0.]).is_nan());
    assert_eq!(float("copysign.f32 %f4, %f1, %f2;", [-0., 2., 0.]), -2.);
}

#[test]
fn comparisons_know_what_is_no_number() {
    let holds = |how: &str, x: f32, y: f32| {
        let text = format!("setp.{how}.f32 %p1, %f1, %f2;\nselp.u32 %r4, 1, 0, %p1;");
        result(&text, [x.to_bits(), y.to_bits(), 0]) == 1
    };
    for (how, less, equal, more, none) in [
        ("eq", false, true, false, false),
        ("ne", true, false, true, false),
        ("lt", true, false, false, false),
        ("le", true, true, false, false),
        ("neu", true, false, true, true),
        ("equ", false, true, false, true),
        ("ltu", true, false, false, true),
        ("geu", false, true, true, true),
        ("num", true, true, true, false),
        ("nan", false, false, false, true),
    ] {
        let found = [(1., 2.), (2., 2.), (3., 2.), (f32::NAN, 2.)].map(|(x, y)| holds(how, x, y));
        assert_eq!(found, [less, equal, more, none], "{how}");
    }
    let text =
        "setp.lt.s32 %p1, %r1, 0;\nsetp.gt.and.u32 %p2, %r1, %r2, %p1;\nselp.u32 %r4, 1, 0, %p2;";
    assert_eq!(result(text, [u32::MAX, 5, 0]), 1);
    assert_eq!(result(text, [7, 5, 0]), 0);
}

#[test]
fn numbers_become_others_as_they_say() {
    let to_int =
        |how: &str, x: f32| result(&format!("cvt.{how}.f32 %r4, %f1;"), [x.to_bits(), 0, 0]) as i32;
    assert_eq!(
        (
            to_int("rni.s32", 2.5),
            to_int("rzi.s32", -2.9),
            to_int("rmi.s32", -2.1),
            to_int("rpi.s32", 2.1)
        ),
        (2, -2, -3, 3)
    );
    assert_eq!(
        (to_int("rzi.s32", 1e20), to_int("rzi.u32", -5.), to_int("rzi.s32", f32::NAN)),
        (i32::MAX, 0, 0)
    );
    assert_eq!(float("cvt.rni.f32.f32 %f4, %f1;", [3.5, 0., 0.]), 4.);
    assert_eq!(float("cvt.sat.f32.f32 %f4, %f1;", [3.5, 0., 0.]), 1.);
    assert_eq!(float("cvt.sat.f32.f32 %f4, %f1;", [f32::NAN, 0., 0.]), 0.);
    assert_eq!(
        result("cvt.rn.bf16x2.f32 %r4, %f1, %f2;", [1f32.to_bits(), 1.011_718_8f32.to_bits(), 0]),
        0x3f80_3f82
    );
    let narrow = "cvt.u16.u32 %rs1, %r1;\ncvt.s32.s16 %r4, %rs1;";
    assert_eq!(result(narrow, [0x0001_8000, 0, 0]), 0xffff_8000);
    let wide = "cvt.s64.s32 %rd5, %r1;\nmul.lo.s64 %rd6, %rd5, %rd5;\nshr.u64 %rd7, %rd6, 32;\ncvt.u32.u64 %r4, %rd7;";
    assert_eq!(result(wide, [(-70_000i32) as u32, 0, 0]), ((70_000u64 * 70_000) >> 32) as u32);
    let double = "cvt.f64.f32 %fd1, %f1;\ndiv.rn.f64 %fd2, %fd1, 0d4008000000000000;\ncvt.rn.f32.f64 %f4, %fd2;\nmov.b32 %r4, %f4;";
    assert_eq!(f32::from_bits(result(double, [1f32.to_bits(), 0, 0])), 1. / 3.);
}

#[test]
fn bits_are_moved_about() {
    assert_eq!(
        result("prmt.b32 %r4, %r1, %r2, 0x5410;", [0x4433_2211, 0x8877_6655, 0]),
        0x6655_2211
    );
    assert_eq!(result("bfi.b32 %r4, %r1, %r2, 8, 4;", [0xff, 0x1234_5678, 0]), 0x1234_5f78);
    assert_eq!(result("shr.s32 %r4, %r1, 40;", [0x8000_0000, 0, 0]), u32::MAX);
    assert_eq!(result("shl.b32 %r4, %r1, 32;", [1, 0, 0]), 0);
    assert_eq!(result("mul.hi.u32 %r4, %r1, %r2;", [1 << 31, 6, 0]), 3);
    assert_eq!(
        result(
            "mov.b64 %rd5, {%r1, %r2};\nshr.u64 %rd6, %rd5, 16;\ncvt.u32.u64 %r4, %rd6;",
            [0xaaaa_bbbb, 0xcccc, 0]
        ),
        0xcccc_aaaa
    );
    let carried = "add.cc.u32 %r5, %r1, %r1;\naddc.u32 %r4, %r2, %r3;";
    assert_eq!(result(carried, [0x8000_0000, 5, 6]), 12);
    assert_eq!(result(carried, [0x7fff_ffff, 5, 6]), 11);
    assert_eq!(result("@!%p1 bra $no;\nmov.u32 %r4, 1;\n$no:\nmov.u32 %r4, 2;", [0; 3]), 2);
}

#[test]
fn accesses_that_are_not_allowed_are_named() {
    let fault = |body: &str| try_run("", body, 1, 3, &mut [0; 4]).unwrap_err().to_string();
    let text = fault("ld.global.u32 %r1, [%rd0+16];");
    assert!(text.contains("k, block [0, 0, 0]") && text.contains("not allocated"), "{text}");
    assert!(text.contains("ld.global.u32 %r1, [%rd0+16]"), "{text}");
    let text = fault("ld.global.u32 %r1, [%rd0+2];");
    assert!(text.contains("not aligned"), "{text}");
    let text =
        fault(".shared .align 4 .b8 room[8];\nmov.u32 %r1, room;\nst.shared.u32 [%r1+16], 3;");
    assert!(text.contains("shared"), "{text}");
    let text = fault("trap;");
    assert!(text.contains("gave up"), "{text}");
    let thread = fault(&format!(
        "{OWN}mul.lo.u32 %r9, %r1, 8;\ncvt.u64.u32 %rd5, %r9;\nadd.s64 %rd6, %rd0, %rd5;\nst.global.u32 [%rd6], %r9;"
    ));
    assert!(thread.contains("thread 2"), "{thread}");
}

#[test]
fn what_is_not_known_is_an_error_and_not_a_guess() {
    for line in [
        "wgmma.fence.sync.aligned;",
        "cvt.rn.satfinite.e4m3x2.f32 %rs1, %f1, %f2;",
        "add.sat.f32 %f1, %f2, %f3;",
        "mov.u32 %r1, nobody;",
    ] {
        let text = format!(
            ".version 9.0\n.visible .entry k()\n{{\n.reg .b16 %rs<9>;\n.reg .f32 %f<9>;\n.reg .b32 %r<9>;\n{line}\nret;\n}}"
        );
        let module = Module::parse(&text).unwrap();
        let error = module.kernel("k").unwrap().err().unwrap();
        assert!(error.contains(line.split(' ').next().unwrap().trim_end_matches(';')), "{error}");
    }
    assert!(Module::parse("no PTX at all").is_err());
}
