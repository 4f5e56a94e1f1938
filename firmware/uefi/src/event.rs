//! Events, timers and task priority levels (UEFI 2.10, section 7.1).
//!
//! An event's handle is a number that is never used twice, so that a stale handle is told from a live one. Notifications
//! are queued by priority and run when the level falls below theirs, with interrupts on.

use crate::arch;
use crate::cell::Global;
use alloc::vec::Vec;
use core::ffi::c_void;
use r_efi::efi::{self, Status};
use uefi_core::guid::Guid;

pub type Notify = unsafe extern "efiapi" fn(efi::Event, *mut c_void);

pub const TPL_APPLICATION: usize = 4;
pub const TPL_CALLBACK: usize = 8;
pub const TPL_NOTIFY: usize = 16;
pub const TPL_HIGH: usize = 31;

pub const EVT_TIMER: u32 = 0x8000_0000;
pub const EVT_RUNTIME: u32 = 0x4000_0000;
pub const EVT_NOTIFY_WAIT: u32 = 0x100;
pub const EVT_NOTIFY_SIGNAL: u32 = 0x200;
const EVT_SIGNAL_EXIT_BOOT_SERVICES: u32 = 0x201;
const EVT_SIGNAL_VIRTUAL_ADDRESS_CHANGE: u32 = 0x6000_0202;

/// `EFI_EVENT_GROUP_EXIT_BOOT_SERVICES`.
pub const GROUP_EXIT_BOOT_SERVICES: Guid =
    Guid::new(0x27abf055, 0xb1b8, 0x4c26, [0x80, 0x48, 0x74, 0x8f, 0x37, 0xba, 0xa2, 0xdf]);
/// `EFI_EVENT_GROUP_BEFORE_EXIT_BOOT_SERVICES`.
pub const GROUP_BEFORE_EXIT_BOOT_SERVICES: Guid =
    Guid::new(0x8be0e274, 0x3970, 0x4b44, [0x80, 0xc5, 0x1a, 0xb9, 0x50, 0x2f, 0x3b, 0xfc]);
/// `EFI_EVENT_GROUP_VIRTUAL_ADDRESS_CHANGE`.
pub const GROUP_VIRTUAL_ADDRESS_CHANGE: Guid =
    Guid::new(0x13fa7698, 0xc831, 0x49c7, [0x87, 0xea, 0x8f, 0x43, 0xfc, 0xc2, 0x51, 0x96]);
/// `EFI_EVENT_GROUP_READY_TO_BOOT`.
pub const GROUP_READY_TO_BOOT: Guid =
    Guid::new(0x7ce88fb3, 0x4bd7, 0x4679, [0x87, 0xa8, 0xa8, 0xd8, 0xde, 0xe5, 0x0d, 0x2b]);
/// `EFI_EVENT_GROUP_MEMORY_MAP_CHANGE`.
pub const GROUP_MEMORY_MAP_CHANGE: Guid =
    Guid::new(0x78bee926, 0x692f, 0x48fd, [0x9e, 0xdb, 0x01, 0x42, 0x2e, 0xf0, 0xd7, 0xab]);

struct Event {
    id: usize,
    kind: u32,
    tpl: usize,
    notify: Option<Notify>,
    context: *mut c_void,
    group: Option<Guid>,
    signaled: bool,
    queued: bool,
    /// Time at which the timer goes off, in 100 ns units; 0: not armed.
    due: u64,
    period: u64,
}

struct State {
    events: Vec<Event>,
    /// Queued notifications, oldest first, with their level.
    queue: Vec<(usize, usize)>,
    next_id: usize,
    tpl: usize,
    /// Earliest due time, so that a tick with nothing to do costs nothing.
    earliest: u64,
}

static STATE: Global<State> =
    Global::new(State { events: Vec::new(), queue: Vec::new(), next_id: 1, tpl: TPL_APPLICATION, earliest: u64::MAX });

impl State {
    fn find(&mut self, event: efi::Event) -> Option<&mut Event> {
        let id = event as usize >> 4;
        // Sorted by id: ids only grow.
        let at = self.events.binary_search_by_key(&id, |e| e.id).ok()?;
        self.events.get_mut(at)
    }

    fn signal(&mut self, at: usize) {
        let e = &mut self.events[at];
        if e.signaled {
            return;
        }
        e.signaled = true;
        if e.kind & EVT_NOTIFY_SIGNAL != 0 && !e.queued {
            e.queued = true;
            let item = (e.id, e.tpl);
            self.queue.push(item);
        }
    }

    fn signal_group(&mut self, group: Guid) {
        for at in 0..self.events.len() {
            if self.events[at].group == Some(group) {
                self.signal(at);
            }
        }
    }

    fn arm(&mut self) {
        self.earliest = self.events.iter().filter(|e| e.due != 0).map(|e| e.due).min().unwrap_or(u64::MAX);
    }
}

fn handle(id: usize) -> efi::Event {
    (id << 4) as efi::Event
}

/// CreateEvent and CreateEventEx.
pub fn create(
    kind: u32,
    tpl: usize,
    notify: Option<Notify>,
    context: *mut c_void,
    group: Option<Guid>,
) -> Result<efi::Event, Status> {
    let mut group = group;
    match kind {
        EVT_SIGNAL_EXIT_BOOT_SERVICES | EVT_SIGNAL_VIRTUAL_ADDRESS_CHANGE if group.is_some() => {
            return Err(Status::INVALID_PARAMETER);
        }
        EVT_SIGNAL_EXIT_BOOT_SERVICES => group = Some(GROUP_EXIT_BOOT_SERVICES),
        EVT_SIGNAL_VIRTUAL_ADDRESS_CHANGE => group = Some(GROUP_VIRTUAL_ADDRESS_CHANGE),
        _ if kind & !(EVT_TIMER | EVT_RUNTIME | EVT_NOTIFY_WAIT | EVT_NOTIFY_SIGNAL) != 0 => {
            return Err(Status::INVALID_PARAMETER);
        }
        _ => {}
    }
    let notified = kind & (EVT_NOTIFY_WAIT | EVT_NOTIFY_SIGNAL);
    if notified == EVT_NOTIFY_WAIT | EVT_NOTIFY_SIGNAL {
        return Err(Status::INVALID_PARAMETER);
    }
    if notified != 0 && (notify.is_none() || !matches!(tpl, TPL_APPLICATION | TPL_CALLBACK | TPL_NOTIFY)) {
        return Err(Status::INVALID_PARAMETER);
    }
    Ok(STATE.with(|s| {
        let id = s.next_id;
        s.next_id += 1;
        let notify = if notified != 0 { notify } else { None };
        let e = Event { id, kind, tpl, notify, context, group, signaled: false, queued: false, due: 0, period: 0 };
        s.events.push(e);
        handle(id)
    }))
}

/// CloseEvent.
pub fn close(event: efi::Event) -> Result<(), Status> {
    crate::handle::forget_event(event);
    STATE.with(|s| {
        let id = s.find(event).ok_or(Status::INVALID_PARAMETER)?.id;
        s.events.retain(|e| e.id != id);
        s.queue.retain(|q| q.0 != id);
        s.arm();
        Ok(())
    })
}

/// SignalEvent.
pub fn signal(event: efi::Event) -> Result<(), Status> {
    STATE.with(|s| {
        let (id, group) = s.find(event).map(|e| (e.id, e.group)).ok_or(Status::INVALID_PARAMETER)?;
        match group {
            Some(group) => s.signal_group(group),
            None => {
                if let Ok(at) = s.events.binary_search_by_key(&id, |e| e.id) {
                    s.signal(at);
                }
            }
        }
        Ok::<(), Status>(())
    })?;
    dispatch();
    Ok(())
}

/// Signals all events of a group.
pub fn signal_group(group: Guid) {
    STATE.with(|s| s.signal_group(group));
    dispatch();
}

/// CheckEvent.
pub fn check(event: efi::Event) -> Result<(), Status> {
    let waits = STATE.with(|s| {
        let e = s.find(event).ok_or(Status::INVALID_PARAMETER)?;
        if e.kind & EVT_NOTIFY_SIGNAL != 0 {
            return Err(Status::INVALID_PARAMETER);
        }
        if !e.signaled && e.kind & EVT_NOTIFY_WAIT != 0 && !e.queued {
            e.queued = true;
            let item = (e.id, e.tpl);
            s.queue.push(item);
            return Ok(true);
        }
        Ok(false)
    })?;
    if waits {
        // The notification may signal the event.
        dispatch();
    }
    STATE.with(|s| {
        let e = s.find(event).ok_or(Status::INVALID_PARAMETER)?;
        if core::mem::take(&mut e.signaled) { Ok(()) } else { Err(Status::NOT_READY) }
    })
}

/// WaitForEvent: index of the first event that is signaled.
pub fn wait(events: &[efi::Event]) -> Result<usize, (Status, usize)> {
    if tpl() != TPL_APPLICATION {
        return Err((Status::UNSUPPORTED, 0));
    }
    if events.is_empty() {
        return Err((Status::INVALID_PARAMETER, 0));
    }
    loop {
        for (i, e) in events.iter().enumerate() {
            match check(*e) {
                Ok(()) => return Ok(i),
                Err(Status::NOT_READY) => {}
                Err(status) => return Err((status, i)),
            }
        }
        arch::wait();
    }
}

/// SetTimer.
pub fn set_timer(event: efi::Event, kind: u32, time: u64) -> Result<(), Status> {
    STATE.with(|s| {
        let now = arch::now();
        let e = s.find(event).ok_or(Status::INVALID_PARAMETER)?;
        if e.kind & EVT_TIMER == 0 {
            return Err(Status::INVALID_PARAMETER);
        }
        (e.due, e.period) = match kind {
            0 => (0, 0),
            // A period of 0 means every tick.
            1 => (now + time.max(1), time.max(1)),
            2 => (now + time.max(1), 0),
            _ => return Err(Status::INVALID_PARAMETER),
        };
        s.arm();
        Ok(())
    })
}

/// The tick: timers that are due go off. Runs in the interrupt, with interrupts off.
pub fn tick() {
    let now = arch::now();
    let due = STATE.with(|s| {
        if now < s.earliest {
            return !s.queue.is_empty();
        }
        for at in 0..s.events.len() {
            let e = &mut s.events[at];
            if e.due != 0 && e.due <= now {
                e.due = if e.period != 0 { (e.due + e.period).max(now + 1) } else { 0 };
                // A timer that was not looked at since it last went off stays signaled; its notification runs again.
                e.signaled = e.signaled && e.kind & EVT_NOTIFY_SIGNAL == 0;
                s.signal(at);
            }
        }
        s.arm();
        true
    });
    if due {
        dispatch();
    }
}

/// Current level.
pub fn tpl() -> usize {
    STATE.with(|s| s.tpl)
}

/// RaiseTPL.
pub fn raise(new: usize) -> usize {
    let old = STATE.with(|s| core::mem::replace(&mut s.tpl, new.min(TPL_HIGH)));
    if new >= TPL_HIGH {
        arch::interrupts_off();
    }
    old
}

/// RestoreTPL.
pub fn restore(old: usize) {
    let was = STATE.with(|s| core::mem::replace(&mut s.tpl, old));
    dispatch();
    if was >= TPL_HIGH && old < TPL_HIGH {
        arch::interrupts_restore(true);
    }
}

/// Runs queued notifications above the current level, highest first, in the order in which they were queued.
fn dispatch() {
    loop {
        let next = STATE.with(|s| {
            let floor = s.tpl;
            let best = s.queue.iter().map(|q| q.1).filter(|l| *l > floor).max()?;
            let at = s.queue.iter().position(|q| q.1 == best)?;
            let (id, level) = s.queue.remove(at);
            let e = s.find(handle(id))?;
            e.queued = false;
            // A signal event's state is spent by its notification; a wait event's is set by it.
            if e.kind & EVT_NOTIFY_SIGNAL != 0 {
                e.signaled = false;
            }
            let call = (e.notify, handle(id), e.context);
            s.tpl = level;
            Some((call, floor))
        });
        let Some(((notify, event, context), floor)) = next else { return };
        if let Some(notify) = notify {
            let on = arch::interrupts_off();
            // Notifications run with interrupts on, whoever dispatches them; the level keeps lower ones out.
            arch::interrupts_restore(true);
            // SAFETY: the creator of the event gave this function to be called so.
            unsafe { notify(event, context) };
            arch::interrupts_off();
            arch::interrupts_restore(on);
        }
        STATE.with(|s| s.tpl = floor);
    }
}

/// Forgets every event that belongs to boot services (ExitBootServices).
pub fn end_boot_services() {
    STATE.with(|s| {
        s.queue.clear();
        s.events.iter_mut().for_each(|e| e.due = 0);
        s.earliest = u64::MAX;
    });
}

/// Runs the notifications of SetVirtualAddressMap: directly, since there are no levels any more.
pub fn virtual_address_change() {
    let mut at = 0;
    loop {
        let next = STATE.with(|s| {
            let e = s.events.get(at)?;
            Some((e.group == Some(GROUP_VIRTUAL_ADDRESS_CHANGE), e.notify, handle(e.id), e.context))
        });
        let Some((ours, notify, event, context)) = next else { return };
        at += 1;
        if let (true, Some(notify)) = (ours, notify) {
            // SAFETY: as in `dispatch`.
            unsafe { notify(event, context) };
        }
    }
}
