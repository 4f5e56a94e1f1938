//! The guest's side of VMBus: hypercalls, SynIC messages, offers, and the drivers of storage and keyboard.
//!
//! Messages are polled: the firmware waits for most of what it asks for. The host's answers are not trusted to be in
//! order or to make sense, only to be the host's.

pub mod channel;
mod keyboard;
mod pass_thru;
pub mod storage;

use crate::arch::{self, hv, rdmsr, wrmsr};
use crate::cell::Global;
use crate::log;
use alloc::vec::Vec;
use vmbus_protocol::message::{self, kind};
use vmbus_protocol::{
    DEFAULT_SINT, EVENT_CONNECTION, Guid, MESSAGE_CONNECTION, MESSAGE_CONNECTION_5, MESSAGE_TYPE, Version, class,
};
use zerocopy::{FromBytes, Immutable, IntoBytes};

pub use keyboard::poll as poll_keyboard;

#[repr(C, align(4096))]
struct Page([u8; 4096]);
impl Page {
    const fn new() -> Global<Page> {
        Global::new(Page([0; 4096]))
    }
}

static HYPERCALL: Global<Page> = Page::new();
static INPUT: Global<Page> = Page::new();
static MESSAGES: Global<Page> = Page::new();
static EVENTS: Global<Page> = Page::new();
static INTERRUPTS: Global<Page> = Page::new();
static MONITOR: [Global<Page>; 2] = [Page::new(), Page::new()];

fn address(page: &Global<Page>) -> u64 {
    page.with(|p| p as *mut Page as u64)
}

struct Bus {
    version: Option<Version>,
    connection: u32,
    offers: Vec<message::Offer>,
    next_gpadl: u32,
}

static BUS: Global<Bus> = Global::new(Bus { version: None, connection: 0, offers: Vec::new(), next_gpadl: 0xe1e10 });

/// How long the host may take to answer, in 100 ns units.
const PATIENCE: u64 = 50_000_000;

/// Hypercall with its input in memory or in registers; returns the status.
fn hypercall(control: u64, input: u64, output: u64) -> u16 {
    let page = address(&HYPERCALL);
    let result: u64;
    // SAFETY: the host has put its instruction sequence into the page; it follows the calling convention of TLFS
    // section 3.7 and keeps all other registers but the volatile ones named here.
    unsafe {
        core::arch::asm!(
            "call {page}",
            page = in(reg) page,
            inout("rcx") control => _,
            inout("rdx") input => _,
            inout("r8") output => _,
            out("rax") result,
            out("r9") _, out("r10") _, out("r11") _,
            out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _, out("xmm4") _, out("xmm5") _,
        );
    }
    result as u16
}

/// HvCallPostMessage.
fn post(message: &[u8]) -> Result<(), u16> {
    const POST_MESSAGE: u64 = 0x5c;
    const INSUFFICIENT_BUFFERS: u16 = 0x13;
    let connection = BUS.with(|b| b.connection);
    let input = address(&INPUT);
    for _ in 0..1000 {
        INPUT.with(|p| {
            p.0[..4].copy_from_slice(&connection.to_le_bytes());
            p.0[4..8].fill(0);
            p.0[8..12].copy_from_slice(&MESSAGE_TYPE.to_le_bytes());
            p.0[12..16].copy_from_slice(&(message.len() as u32).to_le_bytes());
            p.0[16..16 + message.len()].copy_from_slice(message);
            core::hint::black_box(&p.0);
        });
        match hypercall(POST_MESSAGE, input, 0) {
            0 => return Ok(()),
            INSUFFICIENT_BUFFERS => arch::stall(1000),
            other => return Err(other),
        }
    }
    Err(INSUFFICIENT_BUFFERS)
}

fn send<T: IntoBytes + Immutable>(message: &T) -> bool {
    let sent = post(message.as_bytes());
    if let Err(status) = sent {
        log!("vmbus: posting a message failed with hypervisor status {status:#x}");
    }
    sent.is_ok()
}

/// Signals a channel.
pub fn signal(offer: &message::Offer) {
    const SIGNAL_EVENT_FAST: u64 = 0x5d | 1 << 16;
    let dedicated = offer.dedicated_interrupt & 1 != 0;
    let connection = if dedicated { offer.connection_id } else { EVENT_CONNECTION };
    if !dedicated {
        let relid = offer.relid as usize;
        // The host reads the flags from the second half of the interrupt page.
        INTERRUPTS.with(|p| p.0[2048 + relid / 8] |= 1 << (relid % 8));
    }
    hypercall(SIGNAL_EVENT_FAST, u64::from(connection), 0);
}

/// Takes the message that waits on the SINT, if there is one.
fn receive() -> Option<Vec<u8>> {
    let slot = address(&MESSAGES) + u64::from(DEFAULT_SINT) * 256;
    // SAFETY: the message page is the hypervisor's to write; every access is a single volatile one.
    unsafe {
        let kind = slot as *mut u32;
        if kind.read_volatile() == 0 {
            return None;
        }
        core::sync::atomic::fence(core::sync::atomic::Ordering::Acquire);
        let len = ((slot + 4) as *const u8).read_volatile().min(240);
        let data = (0..u64::from(len)).map(|i| ((slot + 16 + i) as *const u8).read_volatile()).collect();
        let pending = ((slot + 5) as *const u8).read_volatile() & 1 != 0;
        kind.write_volatile(0);
        core::sync::atomic::fence(core::sync::atomic::Ordering::SeqCst);
        if pending || ((slot + 5) as *const u8).read_volatile() & 1 != 0 {
            wrmsr(hv::EOM, 0);
        }
        Some(data)
    }
}

/// Waits until `f` finds what it wants in a message. Offers and rescinds on the way are taken note of.
fn wait_for<R>(mut f: impl FnMut(u32, &[u8]) -> Option<R>) -> Option<R> {
    let end = arch::now() + PATIENCE;
    while arch::now() < end {
        let Some(m) = receive() else {
            core::hint::spin_loop();
            continue;
        };
        let Ok((header, _)) = message::Header::read_from_prefix(&m) else { continue };
        let found = f(header.kind, &m);
        note(header.kind, &m);
        if found.is_some() {
            return found;
        }
    }
    None
}

fn note(kind: u32, m: &[u8]) {
    match kind {
        kind::OFFER => {
            if let Ok((offer, _)) = message::Offer::read_from_prefix(m) {
                BUS.with(|b| b.offers.push(offer));
            }
        }
        kind::RESCIND => {
            if let Ok((r, _)) = message::Relid::read_from_prefix(m) {
                BUS.with(|b| b.offers.retain(|o| o.relid != r.relid));
                send(&message::Relid { header: message::Header::new(kind::RELID_RELEASED), relid: r.relid });
            }
        }
        _ => {}
    }
}

/// Connects, takes the offers, starts the drivers. Without Hyper-V's interface there is nothing to do.
pub fn init() {
    use core::arch::x86_64::__cpuid;
    if __cpuid(1).ecx & 1 << 31 == 0 || __cpuid(0x4000_0001).eax != 0x3123_7648 {
        log!("vmbus: no Hyper-V interface");
        return;
    }
    // An open-source operating system that is none of the registered ones; any value but zero enables hypercalls.
    wrmsr(hv::GUEST_OS_ID, 0x8000_0000_0001_0000 | 0x56 << 48);
    wrmsr(hv::HYPERCALL, address(&HYPERCALL) | 1);
    if rdmsr(hv::HYPERCALL) & 1 == 0 {
        log!("vmbus: the hypercall page cannot be enabled");
        return;
    }
    wrmsr(hv::SIMP, address(&MESSAGES) | 1);
    wrmsr(hv::SIEFP, address(&EVENTS) | 1);
    wrmsr(hv::SINT0 + u32::from(DEFAULT_SINT), u64::from(arch::VMBUS_VECTOR));
    wrmsr(hv::SCONTROL, 1);
    if !connect() {
        log!("vmbus: the host accepts no version");
        return;
    }
    send(&message::Header::new(kind::REQUEST_OFFERS));
    if wait_for(|k, _| (k == kind::ALL_OFFERS_DELIVERED).then_some(())).is_none() {
        log!("vmbus: the host has not delivered all offers");
    }
    let offers = BUS.with(|b| b.offers.clone());
    for offer in &offers {
        let class = offer.class;
        if class == class::SCSI && offer.sub_channel_index == 0 {
            storage::start(offer);
        } else if class == class::KEYBOARD {
            keyboard::start(offer);
        }
    }
}

fn connect() -> bool {
    for version in Version::ALL.into_iter().rev().filter(|v| *v >= Version::V2_4) {
        let new = version >= Version::V5_0;
        BUS.with(|b| b.connection = if new { MESSAGE_CONNECTION_5 } else { MESSAGE_CONNECTION });
        let sent = send(&message::InitiateContact {
            header: message::Header::new(kind::INITIATE_CONTACT),
            version: version.0,
            target_vp: 0,
            interrupt_page_or_sint: if new { u64::from(DEFAULT_SINT) } else { address(&INTERRUPTS) },
            monitor_page1: address(&MONITOR[0]),
            monitor_page2: address(&MONITOR[1]),
        });
        if !sent {
            continue;
        }
        let answer = wait_for(|k, m| {
            (k == kind::VERSION_RESPONSE).then(|| message::VersionResponse::read_from_prefix(m).ok().map(|r| r.0))
        });
        let Some(Some(answer)) = answer else { return false };
        if answer.supported != 0 && answer.connection_state == 0 {
            BUS.with(|b| {
                b.version = Some(version);
                if new && answer.connection_id != 0 {
                    b.connection = answer.connection_id;
                }
            });
            log!("vmbus: connected with version {version}");
            return true;
        }
    }
    false
}

/// Makes pages known to the host (a GPADL); returns its number.
pub fn make_gpadl(relid: u32, start: u64, pages: usize) -> Option<u32> {
    const HEADER_PAGES: usize = (240 - 28) / 8;
    const BODY_PAGES: usize = (240 - 16) / 8;
    let gpadl = BUS.with(|b| {
        b.next_gpadl += 1;
        b.next_gpadl
    });
    let numbers: Vec<u64> = (0..pages as u64).map(|i| (start >> 12) + i).collect();
    let (first, rest) = numbers.split_at(numbers.len().min(HEADER_PAGES));
    let mut m = Vec::new();
    m.extend_from_slice(
        message::GpadlHeader {
            header: message::Header::new(kind::GPADL_HEADER),
            relid,
            gpadl,
            range_bytes: (8 + pages * 8) as u16,
            range_count: 1,
        }
        .as_bytes(),
    );
    m.extend_from_slice(message::GpaRange { byte_count: (pages * 4096) as u32, byte_offset: 0 }.as_bytes());
    first.iter().for_each(|n| m.extend(n.to_le_bytes()));
    post(&m).ok()?;
    for (i, part) in rest.chunks(BODY_PAGES).enumerate() {
        let mut m = Vec::new();
        let header = message::Header::new(kind::GPADL_BODY);
        m.extend_from_slice(message::GpadlBody { header, number: i as u32, gpadl }.as_bytes());
        part.iter().for_each(|n| m.extend(n.to_le_bytes()));
        post(&m).ok()?;
    }
    let status = wait_for(|k, m| {
        let (r, _) = message::GpadlCreated::read_from_prefix(m).ok()?;
        (k == kind::GPADL_CREATED && r.gpadl == gpadl).then_some(r.status)
    })?;
    (status == 0).then_some(gpadl)
}

/// Opens a channel whose rings are in a GPADL.
pub fn open(relid: u32, gpadl: u32, send_pages: u32) -> bool {
    let sent = send(&message::Open {
        header: message::Header::new(kind::OPEN),
        relid,
        open_id: relid,
        ring_gpadl: gpadl,
        target_vp: 0,
        downstream_page: send_pages,
        user_data: [0; 120],
    });
    sent && wait_for(|k, m| {
        let (r, _) = message::OpenResult::read_from_prefix(m).ok()?;
        (k == kind::OPEN_RESULT && r.relid == relid).then_some(r.status)
    }) == Some(0)
}

/// Tells the host which part of the frame buffer is shown.
pub fn resolution(width: u32, height: u32, _stride: u32) {
    crate::bios::write(0x5600_0000, width | height << 16);
}

/// Disconnects: the operating system starts from nothing.
pub fn stop() {
    if BUS.with(|b| b.version.take()).is_none() {
        return;
    }
    storage::stop();
    keyboard::stop();
    send(&message::Header::new(kind::UNLOAD));
    wait_for(|k, _| (k == kind::UNLOAD_RESPONSE).then_some(()));
    wrmsr(hv::SINT0 + u32::from(DEFAULT_SINT), 0x1_0000);
    wrmsr(hv::SCONTROL, 0);
    wrmsr(hv::SIMP, 0);
    wrmsr(hv::SIEFP, 0);
    wrmsr(hv::HYPERCALL, 0);
    wrmsr(hv::GUEST_OS_ID, 0);
}

/// The number in a GUID's text form for device paths: class and instance, as Hyper-V's own firmware has them.
pub fn device_path(offer: &message::Offer) -> uefi_core::devpath::DevicePath {
    const VMBUS: uefi_core::guid::Guid =
        uefi_core::guid::Guid::new(0x9b17e5a2, 0x0891, 0x42dd, [0xb6, 0x53, 0x80, 0xb5, 0xc2, 0x28, 0x09, 0xba]);
    let (class, instance): (Guid, Guid) = (offer.class, offer.instance);
    uefi_core::devpath::DevicePath::new().vendor_hardware(VMBUS, &[class.0, instance.0].concat())
}
