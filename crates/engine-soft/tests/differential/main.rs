//! Differential test of the interpreter against the processor that it runs on: every instruction form that the processor
//! model offers and user mode can execute, with random operands, flags and memory; all registers, the defined flags, memory
//! and faults are compared.
//!
//! `VIRIDIAN_DIFF_COUNT` executions (default 2 100 000) are shared among the forms. The seed is always the same unless
//! `VIRIDIAN_DIFF_SEED` gives another one, which (with `VIRIDIAN_DIFF_FORM`, a part of a form's name) also replays a
//! difference from the seed that it prints. `VIRIDIAN_DIFF_LIST=1` prints every form that is not covered;
//! `VIRIDIAN_DIFF_TRACE=1` prints each instruction before it is executed.

#[cfg(target_arch = "x86_64")]
mod forms;
#[cfg(target_arch = "x86_64")]
mod guest;
#[cfg(target_arch = "x86_64")]
mod native;
#[cfg(target_arch = "x86_64")]
mod random;

use forms::{Instance, Needs, excluded, instance, offered};
use iced_x86::{Code, Mnemonic, Register, RflagsBits};
use native::{BASE16, DATA, DATA_LEN, End, Mode, Outcome, READ_ONLY, State, XSAVE};
use random::Random;
use std::collections::BTreeMap;
use std::fmt::Write;
use x86::regs::{gpr, rflags};

/// States that one encoded instruction is executed from.
const STATES: usize = 16;
/// Seed of a run that is not given one: what one run lets pass, the next one must.
const SEED: u64 = 0x1234_5678_9abc_def1;

/// An address for an operand: mostly inside the data, sometimes across pages, at the edges or nowhere.
fn place(r: &mut Random) -> u64 {
    match r.below(32) {
        0 => DATA + 0x1000 - r.below(33),
        1 => READ_ONLY - r.below(33),
        2 => READ_ONLY + r.below(0x1000),
        3 => READ_ONLY + 0x1000 - r.below(33),
        4 => DATA - r.below(33),
        5..12 => DATA + 64 + r.below(DATA_LEN as u64 - 192),
        _ => DATA + 64 + (r.below(DATA_LEN as u64 - 192) & !63),
    }
}

fn state(needs: &Needs, mnemonic: Mnemonic, mode: Mode, r: &mut Random) -> State {
    let mut s = State { gprs: [0; 16], rip: mode.start(), rflags: 0, xsave: [0; XSAVE] };
    // What is added to offsets in DS and ES.
    let base16 = if mode == Mode::Compat16 { BASE16 } else { 0 };
    let compatibility = mode != Mode::Long;
    for v in &mut s.gprs {
        *v = r.value();
    }
    s.gprs[gpr::RSP] = DATA + 256 + (r.below(DATA_LEN as u64 - 512) & !7);
    match r.below(32) {
        0 => s.gprs[gpr::RSP] = place(r),
        1 => s.gprs[gpr::RSP] = READ_ONLY + 0x1000 - r.below(4) * 8,
        2 => s.gprs[gpr::RSP] = DATA + r.below(4) * 8,
        _ => {}
    }
    if matches!(mnemonic, Mnemonic::Popf | Mnemonic::Popfd | Mnemonic::Popfq) {
        s.gprs[gpr::RSP] &= !3;
    }
    if matches!(mnemonic, Mnemonic::Leave | Mnemonic::Enter) {
        s.gprs[gpr::RBP] = place(r);
    }
    if is_xsave(mnemonic) {
        // The host has more components than the models.
        s.gprs[gpr::RAX] = if r.below(2) == 0 { 7 } else { r.below(8) };
        s.gprs[gpr::RDX] = 0;
    }
    if matches!(mnemonic, Mnemonic::Div | Mnemonic::Idiv) && r.below(4) != 0 {
        // Quotients that fit.
        s.gprs[gpr::RDX] = if r.below(2) == 0 { 0 } else { (s.gprs[gpr::RAX] as i64 >> 63) as u64 };
    }
    if needs.implicit {
        for n in [gpr::RSI, gpr::RDI, gpr::RBX] {
            s.gprs[n] = place(r) - base16;
        }
        if r.below(8) != 0 {
            s.gprs[gpr::RCX] = r.below(80);
        }
    }
    s.rflags = r.next() & rflags::STATUS | if r.below(4) == 0 { rflags::DF } else { 0 };
    vectors(&mut s, r);
    if let Some((n, element)) = needs.vsib {
        for half in [160 + 16 * n, 576 + 16 * n] {
            for k in (0..16).step_by(element) {
                let v = (r.below(256) as i64 - 128).to_le_bytes();
                s.xsave[half + k..half + k + element].copy_from_slice(&v[..element]);
            }
        }
    }
    if let Some((base, index, scale, displacement)) = needs.memory {
        let target = if needs.vsib.is_some() { DATA + 0xc00 + r.below(512) } else { place(r) };
        let target = if is_xsave(mnemonic) && r.below(8) != 0 { XSAVE_AT } else { target };
        let stack = matches!(base.full_register(), Register::RSP | Register::RBP);
        let target = if stack { target } else { target - base16 };
        let general = |reg: Register| reg.is_gpr().then(|| reg.number());
        let mut scaled = 0u64;
        match (general(base), general(index)) {
            (Some(b), Some(x)) if b == x => {
                // One register twice: what it must hold may not be an integer; then wherever it falls.
                s.gprs[b] = target.wrapping_sub(displacement) / (1 + u64::from(scale));
            }
            (b, x) => {
                if let Some(x) = x {
                    if r.below(2) == 0 {
                        s.gprs[x] = r.below(64);
                    }
                    scaled = s.gprs[x].wrapping_mul(scale.into());
                }
                if let Some(b) = b {
                    s.gprs[b] = target.wrapping_sub(displacement).wrapping_sub(scaled);
                    if !compatibility && r.below(64) == 0 {
                        s.gprs[b] |= 1 << 63;
                    }
                }
            }
        }
    }
    if compatibility {
        for v in &mut s.gprs[..8] {
            *v &= 0xffff_ffff;
        }
        s.gprs[8..].fill(0);
    }
    s
}

/// x87, MMX, SSE and AVX registers and their control words.
fn vectors(s: &mut State, r: &mut Random) {
    let x = &mut s.xsave;
    let fcw: u16 = match r.below(4) {
        0 => 0x37f,
        1 => 0x27f,
        2 => 0x07f | (r.below(16) as u16) << 8,
        _ => 0x340 | r.next() as u16 & 0xf3f,
    };
    x[0..2].copy_from_slice(&fcw.to_le_bytes());
    // Exceptions that wait would only test FWAIT: those flags that are unmasked stay clear.
    let fsw = r.next() as u16 & 0x7f00 | r.next() as u16 & fcw & 0x3f;
    let fsw = if r.below(2) == 0 { fsw & 0x3800 } else { fsw & !0x8080 };
    x[2..4].copy_from_slice(&fsw.to_le_bytes());
    x[4] = match r.below(3) {
        0 => 0xff,
        1 => 0,
        _ => r.next() as u8,
    };
    let mxcsr: u32 = match r.below(4) {
        0 | 1 => 0x1f80,
        2 => 0x1f80 | r.next() as u32 & 0xe07f,
        _ => r.next() as u32 & 0xffff,
    };
    x[24..28].copy_from_slice(&mxcsr.to_le_bytes());
    for n in 0..8 {
        let st = &mut x[32 + 16 * n..32 + 16 * n + 10];
        let mantissa = if r.below(8) == 0 { r.next() } else { r.next() | 1 << 63 };
        let exponent = match r.below(6) {
            0 => 0,
            1 => 0x7fff,
            2 => r.next() as u16,
            _ => 0x3fff - 20 + r.below(60) as u16,
        } | (r.next() as u16 & 0x8000);
        let mantissa = if r.below(4) == 0 { mantissa & 0xffff_0000_0000_0000 } else { mantissa };
        st[..8].copy_from_slice(&mantissa.to_le_bytes());
        st[8..].copy_from_slice(&exponent.to_le_bytes());
    }
    for n in 0..16 {
        x[160 + 16 * n..176 + 16 * n].copy_from_slice(&r.vector());
        x[576 + 16 * n..592 + 16 * n].copy_from_slice(&r.vector());
    }
}

fn memory(r: &mut Random, mnemonic: Mnemonic) -> Vec<u8> {
    let mut m = vec![0; DATA_LEN];
    let mut block = [0; 256];
    for c in block.chunks_exact_mut(16) {
        c.copy_from_slice(&r.vector());
    }
    for (n, c) in m.chunks_exact_mut(256).enumerate() {
        c.copy_from_slice(&block);
        c.rotate_left(n % 256);
    }
    if is_xsave(mnemonic) {
        xsave_header(&mut m, r);
    }
    if matches!(mnemonic, Mnemonic::Popf | Mnemonic::Popfd | Mnemonic::Popfq) {
        // Neither single step nor alignment checks: they are the tester's own business.
        for c in m.chunks_exact_mut(4) {
            c[1] &= !1;
            c[2] &= !4;
        }
    }
    m
}

/// Where the areas of the XSAVE family mostly are.
const XSAVE_AT: u64 = DATA + 0x400;

fn is_xsave(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        mnemonic,
        M::Xsave | M::Xsave64 | M::Xsaveopt | M::Xsaveopt64 | M::Xsavec | M::Xsavec64 | M::Xrstor | M::Xrstor64
    )
}

/// A header that XRSTOR mostly takes, standard or compacted, and an MXCSR.
fn xsave_header(m: &mut [u8], r: &mut Random) {
    let area = &mut m[(XSAVE_AT - DATA) as usize..];
    let mxcsr = r.next() as u32 & if r.below(8) == 0 { 0xff_ffff } else { 0xffff };
    area[24..28].copy_from_slice(&(mxcsr & !0x2_0000).to_le_bytes());
    let header = &mut area[512..576];
    header.fill(0);
    header[0] = if r.below(8) == 0 { r.next() as u8 & 0xf } else { r.next() as u8 & 7 };
    match r.below(8) {
        0..3 => {
            let compacted = 1 << 63 | u64::from(header[0]) | r.below(8);
            header[8..16].copy_from_slice(&compacted.to_le_bytes());
        }
        3 => header[8 + r.below(56) as usize] = 1,
        _ => {}
    }
}

fn undefined_flags(i: &iced_x86::Instruction) -> u64 {
    let u = i.rflags_undefined();
    [
        (RflagsBits::OF, rflags::OF),
        (RflagsBits::SF, rflags::SF),
        (RflagsBits::ZF, rflags::ZF),
        (RflagsBits::AF, rflags::AF),
        (RflagsBits::CF, rflags::CF),
        (RflagsBits::PF, rflags::PF),
    ]
    .iter()
    .filter(|(bit, _)| u & bit != 0)
    .fold(0, |mask, (_, flag)| mask | flag)
}

/// Instructions that store or load an image of the register file, for which less can be compared.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Image {
    Fxsave,
    Fnsave,
    Other,
    /// Ten bytes, which processors move as eight and two: the segment's limit is checked once for each piece, so that a
    /// page fault of the first may come before a violation of the limit by the second.
    Ten,
}

/// LDMXCSR or FXRSTOR with bit 17 set: the host has misaligned SSE, which is not part of the models.
fn host_extension(mnemonic: Mnemonic, native: &Outcome, soft: &Outcome) -> bool {
    matches!(mnemonic, Mnemonic::Ldmxcsr | Mnemonic::Vldmxcsr | Mnemonic::Fxrstor | Mnemonic::Fxrstor64)
        && native.state.xsave[26] & 2 != 0
        && soft.end == End::Fault(13, 0, 0)
}

fn image_of(i: &iced_x86::Instruction) -> Option<Image> {
    use Mnemonic as M;
    Some(match i.mnemonic() {
        M::Fxsave | M::Fxsave64 => Image::Fxsave,
        M::Xsave | M::Xsave64 | M::Xsaveopt | M::Xsaveopt64 | M::Xsavec | M::Xsavec64 => Image::Fxsave,
        M::Xrstor | M::Xrstor64 => Image::Other,
        M::Fnsave => Image::Fnsave,
        M::Fxrstor | M::Fxrstor64 | M::Frstor | M::Fldenv | M::Fnstenv => Image::Other,
        M::Fbld | M::Fbstp | M::Fld | M::Fstp if i.memory_size().size() == 10 => Image::Ten,
        _ => return None,
    })
}

fn same_end(a: &End, b: &End, image: Option<Image>) -> bool {
    match (a, b) {
        (End::Fault(14, ..), End::Fault(12..=13, ..)) if image == Some(Image::Ten) => true,
        // In another order, another page may come first, or the segment's limit.
        (End::Fault(12..=14, ..), End::Fault(12..=14, ..)) if !matches!(image, None | Some(Image::Ten)) => true,
        // The upper half is the host's kernel, which is present; the guest has nothing there.
        (End::Fault(14, e, x), End::Fault(14, f, y)) if x >> 63 != 0 => x == y && e | 1 == f | 1,
        _ => a == b,
    }
}

/// What differs, in words; empty if nothing does.
fn compare(native: &Outcome, soft: &Outcome, undefined: u64, image: Option<Image>) -> String {
    let mut out = String::new();
    if !same_end(&native.end, &soft.end, image) {
        let _ = writeln!(out, "  end: native {:x?}, interpreter {:x?}", native.end, soft.end);
    }
    let names = ["rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi"];
    for n in 0..16 {
        if native.state.gprs[n] != soft.state.gprs[n] {
            let name = names.get(n).map_or_else(|| format!("r{n}"), |s| (*s).to_owned());
            let _ =
                writeln!(out, "  {name}: native {:#x}, interpreter {:#x}", native.state.gprs[n], soft.state.gprs[n]);
        }
    }
    if native.state.rip != soft.state.rip {
        let _ = writeln!(out, "  rip: native {:#x}, interpreter {:#x}", native.state.rip, soft.state.rip);
    }
    let flags = (native.state.rflags ^ soft.state.rflags) & !undefined;
    if flags != 0 {
        let _ = writeln!(
            out,
            "  rflags: native {:#x}, interpreter {:#x}, differ in {flags:#x}",
            native.state.rflags, soft.state.rflags
        );
    }
    // FOP, FIP, FDP and MXCSR_MASK (bytes 6 to 23, 28 to 31) and the unused bytes behind each ST register are left out.
    let compared = |n: usize| match n {
        0..5 | 24..28 | 160..416 | 576.. => true,
        // FNSAVE empties all registers; what stays in them is nobody's business.
        32..160 => n % 16 < 10 && image != Some(Image::Fnsave),
        _ => false,
    };
    for n in (0..XSAVE).filter(|n| compared(*n) && native.state.xsave[*n] != soft.state.xsave[*n]).take(8) {
        let what = match n {
            0..24 => "x87 control".to_owned(),
            24..32 => "MXCSR".to_owned(),
            32..160 => format!("st{}", (n - 32) / 16),
            160..416 => format!("xmm{}", (n - 160) / 16),
            _ => format!("ymm{} (upper)", (n - 576) / 16),
        };
        let _ = writeln!(
            out,
            "  {what}, image byte {n}: native {:#x}, interpreter {:#x}",
            native.state.xsave[n], soft.state.xsave[n]
        );
    }
    // MXCSR_MASK is the processor's: bit 17 (misaligned SSE) is not part of the models.
    let mask_byte = |n: usize| image == Some(Image::Fxsave) && native.memory[n] == 2 && soft.memory[n] == 0;
    for n in (0..DATA_LEN).filter(|n| native.memory[*n] != soft.memory[*n] && !mask_byte(*n)).take(8) {
        let _ = writeln!(
            out,
            "  memory at {:#x}: native {:#x}, interpreter {:#x}",
            DATA + n as u64,
            native.memory[n],
            soft.memory[n]
        );
    }
    out
}

fn env(name: &str) -> Option<u64> {
    let v = std::env::var(name).ok()?;
    let v = v.trim();
    Some(v.strip_prefix("0x").map_or_else(|| v.parse(), |h| u64::from_str_radix(h, 16)).expect("a number"))
}

/// Executes one instance from [`STATES`] states on both; returns descriptions of differences.
fn round(guest: &mut guest::Guest, made: &Instance, mode: Mode, r: &mut Random) -> (Vec<String>, u64) {
    let mnemonic = made.instruction.mnemonic();
    let cases: Vec<State> = (0..STATES).map(|_| state(&made.needs, mnemonic, mode, r)).collect();
    let memory = memory(r, mnemonic);
    let native = native::run(&made.bytes, cases.clone(), memory.clone(), mode);
    guest.prepare(&made.bytes, mode);
    let undefined = undefined_flags(&made.instruction);
    // Instructions that store or load an image piece by piece do so in an order of their own.
    let image = image_of(&made.instruction);
    let mut differences = Vec::new();
    for (case, native) in cases.iter().zip(&native) {
        let soft = guest.run(case, &memory);
        let d = compare(native, &soft, undefined, image);
        if !d.is_empty() && !host_extension(mnemonic, native, &soft) {
            differences.push(format!(
                "{}({:02x?})\n{d}  before: gprs {:x?} rflags {:#x} fcw {:02x?} mxcsr {:02x?}, native {:x?}",
                made.instruction,
                made.bytes,
                case.gprs,
                case.rflags,
                &case.xsave[..6],
                &case.xsave[24..28],
                native.end
            ));
        }
    }
    let completed = native.iter().filter(|o| o.end == End::Done).count() as u64;
    (differences, completed)
}

#[derive(Default)]
struct Coverage {
    executions: u64,
    /// The instruction completed (did not fault) at least once.
    completed: bool,
    differences: u64,
}

#[test]
fn every_form_behaves_as_on_the_host() {
    native::init();
    let model = std::env::var("VIRIDIAN_DIFF_MODEL").unwrap_or_else(|_| "host".into());
    let mut guest = guest::Guest::new(&model);
    let features = guest.vp.features.clone();
    let total = env("VIRIDIAN_DIFF_COUNT").unwrap_or(2_100_000);
    let seed = env("VIRIDIAN_DIFF_SEED").unwrap_or(SEED);
    let trace = env("VIRIDIAN_DIFF_TRACE").is_some();
    let only = std::env::var("VIRIDIAN_DIFF_FORM").ok();
    println!("differential test: model {model}, seed {seed:#x}, {total} executions");

    let forms: Vec<Code> = Code::values().filter(|c| offered(*c, &features)).collect();
    let mut coverage: BTreeMap<usize, Coverage> = BTreeMap::new();
    let mut left_out: BTreeMap<&str, Vec<Code>> = BTreeMap::new();
    let mut executions = 0;
    let mut differences = 0;
    let mut pass = 0u64;
    let mut by_mode: BTreeMap<u32, (u64, u64)> = BTreeMap::new();
    let mut dead = std::collections::HashSet::new();
    'all: loop {
        let before = executions;
        for &code in &forms {
            if excluded(code).is_some() || dead.contains(&code) {
                continue;
            }
            if only.as_ref().is_some_and(|o| !format!("{code:?}").contains(o.as_str())) {
                continue;
            }
            let info = code.op_code();
            let mode = match pass % 8 {
                3 | 6 if info.mode32() => Mode::Compat32,
                5 | 7 if info.mode16() => Mode::Compat16,
                _ if !info.mode64() => Mode::Compat32,
                _ => Mode::Long,
            };
            let mut r = Random(seed ^ (code as u64).wrapping_mul(0x1234_5678_9abc_def1) ^ pass << 48);
            let Some(made) = (0..24).find_map(|_| instance(code, mode, &features, &mut r)) else {
                if pass == 0 {
                    dead.insert(code);
                }
                continue;
            };
            if trace {
                println!("{code:?} {:02x?} {:?}", made.bytes, made.instruction.mnemonic());
            }
            let (found, completed) = round(&mut guest, &made, mode, &mut r);
            let c = coverage.entry(code as usize).or_default();
            c.executions += STATES as u64;
            executions += STATES as u64;
            c.completed |= completed > 0;
            let of_mode = by_mode.entry(mode.bits()).or_insert((0, 0));
            of_mode.0 += STATES as u64;
            of_mode.1 += completed;
            c.differences += found.len() as u64;
            differences += found.len() as u64;
            if let Some(first) = found.first()
                && c.differences <= STATES as u64
            {
                println!("DIFFERENCE {code:?} {mode:?} (pass {pass}, {} of {STATES} states): {first}", found.len());
            }
            if executions >= total {
                break 'all;
            }
        }
        pass += 1;
        if executions == before {
            break;
        }
    }
    for &code in &forms {
        if !coverage.contains_key(&(code as usize)) {
            left_out.entry(excluded(code).unwrap_or("no encoding of its own")).or_default().push(code);
        }
    }
    // Forms without an encoding of their own (other names of one encoding, reserved hints that decode as what they are
    // reserved for) are not forms that the model allows.
    let nameless = left_out.get("no encoding of its own").map_or(0, Vec::len);
    let allowed = forms.len() - nameless;
    println!("\n{:>8}  forms", "count");
    println!("{:>8}  offered by the model", allowed);
    println!("{:>8}  compared", coverage.len());
    for (reason, codes) in &left_out {
        println!("{:>8}  not compared: {reason}", codes.len());
        if std::env::var("VIRIDIAN_DIFF_LIST").is_ok() {
            println!("            {codes:?}");
        }
    }
    for (bits, (executed, completed)) in &by_mode {
        println!("{executed:>8}  executions of {bits}-bit code, {completed} of them without a fault");
    }
    let never = coverage.values().filter(|c| !c.completed).count();
    println!("{never:>8}  forms that always fault here (privileged, undefined)");
    println!("executions {executions}, passes {}, differences {differences}", pass + 1);
    for (code, c) in coverage.iter().filter(|(_, c)| c.differences > 0) {
        println!(
            "{:?}: {} of {} executions differ",
            Code::values().nth(*code).unwrap_or_default(),
            c.differences,
            c.executions
        );
    }
    assert!(executions > 0, "no form matches");
    assert_eq!(differences, 0, "seed {seed:#x}");
    if only.is_none() {
        assert!(coverage.len() * 100 >= allowed * 95, "{} of {allowed} forms", coverage.len());
    }
}
