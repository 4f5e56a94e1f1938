//! The protocol database: handles, interfaces, who opened them, drivers and controllers (UEFI 2.10, section 7.3).

use crate::cell::Global;
use crate::event;
use alloc::vec::Vec;
use core::ffi::c_void;
use r_efi::efi::{self, Status};
use r_efi::protocols::{device_path, driver_binding};
use uefi_core::guid::Guid;

/// Attributes of OpenProtocol.
pub mod open {
    pub const BY_HANDLE_PROTOCOL: u32 = 0x01;
    pub const GET_PROTOCOL: u32 = 0x02;
    pub const TEST_PROTOCOL: u32 = 0x04;
    pub const BY_CHILD_CONTROLLER: u32 = 0x08;
    pub const BY_DRIVER: u32 = 0x10;
    pub const EXCLUSIVE: u32 = 0x20;
}
use open::*;

/// One entry of OpenProtocolInformation.
#[derive(Clone, Copy)]
pub struct Opening {
    pub agent: efi::Handle,
    pub controller: efi::Handle,
    pub attributes: u32,
    pub count: u32,
}

struct Interface {
    guid: Guid,
    pointer: *mut c_void,
    openings: Vec<Opening>,
}

struct Handle {
    id: usize,
    interfaces: Vec<Interface>,
}

struct Registration {
    guid: Guid,
    event: efi::Event,
    key: usize,
    /// Handles that the owner has not been told of yet.
    fresh: Vec<usize>,
}

struct Database {
    handles: Vec<Handle>,
    registrations: Vec<Registration>,
    next: usize,
}

static DATABASE: Global<Database> = Global::new(Database { handles: Vec::new(), registrations: Vec::new(), next: 1 });

fn number(handle: efi::Handle) -> usize {
    handle as usize >> 4
}
fn pointer(id: usize) -> efi::Handle {
    (id << 4) as efi::Handle
}

impl Database {
    fn find(&mut self, handle: efi::Handle) -> Option<&mut Handle> {
        let at = self.handles.binary_search_by_key(&number(handle), |h| h.id).ok()?;
        self.handles.get_mut(at)
    }
    fn interface(&mut self, handle: efi::Handle, guid: &Guid) -> Result<&mut Interface, Status> {
        let h = self.find(handle).ok_or(Status::INVALID_PARAMETER)?;
        h.interfaces.iter_mut().find(|i| i.guid == *guid).ok_or(Status::UNSUPPORTED)
    }
}

/// Is it a handle?
pub fn is_valid(handle: efi::Handle) -> bool {
    DATABASE.with(|d| d.find(handle).is_some())
}

/// InstallProtocolInterface. A null handle makes a new one.
pub fn install(handle: efi::Handle, guid: &Guid, interface: *mut c_void) -> Result<efi::Handle, Status> {
    let (handle, events) = DATABASE.with(|d| {
        let handle = if handle.is_null() {
            let id = d.next;
            d.next += 1;
            d.handles.push(Handle { id, interfaces: Vec::new() });
            pointer(id)
        } else {
            handle
        };
        let h = d.find(handle).ok_or(Status::INVALID_PARAMETER)?;
        if h.interfaces.iter().any(|i| i.guid == *guid) {
            return Err(Status::INVALID_PARAMETER);
        }
        h.interfaces.insert(0, Interface { guid: *guid, pointer: interface, openings: Vec::new() });
        Ok((handle, d.announce(handle, guid)))
    })?;
    for e in events {
        let _ = event::signal(e);
    }
    Ok(handle)
}

impl Database {
    fn announce(&mut self, handle: efi::Handle, guid: &Guid) -> Vec<efi::Event> {
        let waiting = self.registrations.iter_mut().filter(|r| r.guid == *guid);
        waiting
            .map(|r| {
                r.fresh.push(number(handle));
                r.event
            })
            .collect()
    }

    fn take_interface(&mut self, handle: efi::Handle, guid: &Guid, interface: *mut c_void) -> Result<(), Status> {
        let h = self.find(handle).ok_or(Status::INVALID_PARAMETER)?;
        let at =
            h.interfaces.iter().position(|i| i.guid == *guid && i.pointer == interface).ok_or(Status::NOT_FOUND)?;
        let held = |o: &Opening| o.attributes & (BY_CHILD_CONTROLLER | BY_DRIVER | EXCLUSIVE) != 0;
        if h.interfaces[at].openings.iter().any(held) {
            return Err(Status::ACCESS_DENIED);
        }
        h.interfaces.remove(at);
        let empty = h.interfaces.is_empty();
        let id = h.id;
        for r in &mut self.registrations {
            if r.guid == *guid {
                r.fresh.retain(|f| *f != id);
            }
        }
        if empty {
            self.handles.retain(|h| h.id != id);
        }
        Ok(())
    }
}

/// Disconnects the drivers that hold an interface, which is about to go.
fn disconnect_users(handle: efi::Handle, guid: &Guid) {
    let agents: Vec<efi::Handle> = openings(handle, guid)
        .unwrap_or_default()
        .iter()
        .filter(|o| o.attributes & BY_DRIVER != 0)
        .map(|o| o.agent)
        .collect();
    for agent in agents {
        let _ = disconnect(handle, agent, core::ptr::null_mut());
    }
    // Those who only looked do not keep it.
    DATABASE.with(|d| {
        if let Ok(i) = d.interface(handle, guid) {
            i.openings.retain(|o| o.attributes & (BY_CHILD_CONTROLLER | BY_DRIVER | EXCLUSIVE) != 0);
        }
    });
}

/// UninstallProtocolInterface.
pub fn uninstall(handle: efi::Handle, guid: &Guid, interface: *mut c_void) -> Result<(), Status> {
    let exact = DATABASE.with(|d| {
        let h = d.find(handle).ok_or(Status::INVALID_PARAMETER)?;
        let found = h.interfaces.iter().any(|i| i.guid == *guid && i.pointer == interface);
        if found { Ok(()) } else { Err(Status::NOT_FOUND) }
    });
    exact?;
    disconnect_users(handle, guid);
    DATABASE.with(|d| d.take_interface(handle, guid, interface))
}

/// ReinstallProtocolInterface.
pub fn reinstall(handle: efi::Handle, guid: &Guid, old: *mut c_void, new: *mut c_void) -> Result<(), Status> {
    DATABASE.with(|d| {
        let h = d.find(handle).ok_or(Status::INVALID_PARAMETER)?;
        let found = h.interfaces.iter().any(|i| i.guid == *guid && i.pointer == old);
        if found { Ok(()) } else { Err(Status::NOT_FOUND) }
    })?;
    disconnect_users(handle, guid);
    let events = DATABASE.with(|d| {
        let i = d.interface(handle, guid)?;
        if i.openings.iter().any(|o| o.attributes & (BY_CHILD_CONTROLLER | BY_DRIVER | EXCLUSIVE) != 0) {
            return Err(Status::ACCESS_DENIED);
        }
        i.pointer = new;
        Ok(d.announce(handle, guid))
    })?;
    for e in events {
        let _ = event::signal(e);
    }
    let _ = connect(handle, &[], core::ptr::null_mut(), true);
    Ok(())
}

/// The interface of a protocol on a handle, without any record of the opening.
pub fn get(handle: efi::Handle, guid: &Guid) -> Result<*mut c_void, Status> {
    DATABASE.with(|d| d.interface(handle, guid).map(|i| i.pointer))
}

/// OpenProtocol.
pub fn open_protocol(
    handle: efi::Handle,
    guid: &Guid,
    agent: efi::Handle,
    controller: efi::Handle,
    attributes: u32,
) -> Result<*mut c_void, Status> {
    let valid = |h: efi::Handle| is_valid(h);
    match attributes {
        BY_CHILD_CONTROLLER if !valid(agent) || !valid(controller) || handle == controller => {
            return Err(Status::INVALID_PARAMETER);
        }
        BY_DRIVER | 0x30 if !valid(agent) || !valid(controller) => return Err(Status::INVALID_PARAMETER),
        EXCLUSIVE if !valid(agent) => return Err(Status::INVALID_PARAMETER),
        BY_HANDLE_PROTOCOL | GET_PROTOCOL | TEST_PROTOCOL | BY_CHILD_CONTROLLER | BY_DRIVER | EXCLUSIVE | 0x30 => {}
        _ => return Err(Status::INVALID_PARAMETER),
    }
    let exclusive = attributes & EXCLUSIVE != 0;
    let drivers = DATABASE.with(|d| {
        let i = d.interface(handle, guid)?;
        let mut drivers = Vec::new();
        for o in &i.openings {
            if attributes & BY_DRIVER != 0 && o.attributes & BY_DRIVER != 0 && o.agent == agent {
                let same = o.controller == controller && o.attributes == attributes;
                return Err(if same { Status::ALREADY_STARTED } else { Status::ACCESS_DENIED });
            }
            if attributes & (BY_DRIVER | EXCLUSIVE) != 0 && o.attributes & EXCLUSIVE != 0 {
                return Err(Status::ACCESS_DENIED);
            }
            if o.attributes & BY_DRIVER != 0 {
                if exclusive {
                    drivers.push(o.agent);
                } else if attributes & BY_DRIVER != 0 {
                    return Err(Status::ACCESS_DENIED);
                }
            }
        }
        Ok(drivers)
    })?;
    // An exclusive opening asks the drivers to leave.
    for driver in drivers {
        disconnect(handle, driver, core::ptr::null_mut()).map_err(|_| Status::ACCESS_DENIED)?;
    }
    DATABASE.with(|d| {
        let i = d.interface(handle, guid)?;
        if !agent.is_null() && attributes != TEST_PROTOCOL {
            let same = |o: &&mut Opening| o.agent == agent && o.controller == controller && o.attributes == attributes;
            match i.openings.iter_mut().find(same) {
                Some(o) => o.count += 1,
                None => i.openings.push(Opening { agent, controller, attributes, count: 1 }),
            }
        }
        Ok(i.pointer)
    })
}

/// CloseProtocol.
pub fn close_protocol(
    handle: efi::Handle,
    guid: &Guid,
    agent: efi::Handle,
    controller: efi::Handle,
) -> Result<(), Status> {
    if !is_valid(agent) || !controller.is_null() && !is_valid(controller) {
        return Err(Status::INVALID_PARAMETER);
    }
    DATABASE.with(|d| {
        let h = d.find(handle).ok_or(Status::INVALID_PARAMETER)?;
        let i = h.interfaces.iter_mut().find(|i| i.guid == *guid).ok_or(Status::NOT_FOUND)?;
        let before = i.openings.len();
        i.openings.retain(|o| o.agent != agent || o.controller != controller);
        if i.openings.len() == before { Err(Status::NOT_FOUND) } else { Ok(()) }
    })
}

/// OpenProtocolInformation.
pub fn openings(handle: efi::Handle, guid: &Guid) -> Result<Vec<Opening>, Status> {
    DATABASE.with(|d| match d.interface(handle, guid) {
        Ok(i) => Ok(i.openings.clone()),
        Err(Status::UNSUPPORTED) => Err(Status::NOT_FOUND),
        Err(e) => Err(e),
    })
}

/// ProtocolsPerHandle.
pub fn protocols(handle: efi::Handle) -> Result<Vec<Guid>, Status> {
    DATABASE.with(|d| Ok(d.find(handle).ok_or(Status::INVALID_PARAMETER)?.interfaces.iter().map(|i| i.guid).collect()))
}

/// All handles.
pub fn all() -> Vec<efi::Handle> {
    DATABASE.with(|d| d.handles.iter().map(|h| pointer(h.id)).collect())
}

/// Handles with a protocol.
pub fn with_protocol(guid: &Guid) -> Vec<efi::Handle> {
    DATABASE.with(|d| {
        let has = |h: &&Handle| h.interfaces.iter().any(|i| i.guid == *guid);
        d.handles.iter().filter(has).map(|h| pointer(h.id)).collect()
    })
}

/// RegisterProtocolNotify.
pub fn register(guid: &Guid, event: efi::Event) -> *mut c_void {
    DATABASE.with(|d| {
        let key = d.next;
        d.next += 1;
        d.registrations.push(Registration { guid: *guid, event, key, fresh: Vec::new() });
        pointer(key)
    })
}

/// The next handle that a registration's owner has not seen, with its interface.
pub fn next_registered(key: *mut c_void) -> Result<(efi::Handle, *mut c_void), Status> {
    DATABASE.with(|d| {
        let key = number(key);
        let r = d.registrations.iter_mut().find(|r| r.key == key).ok_or(Status::INVALID_PARAMETER)?;
        if r.fresh.is_empty() {
            return Err(Status::NOT_FOUND);
        }
        let (handle, guid) = (pointer(r.fresh.remove(0)), r.guid);
        d.interface(handle, &guid).map(|i| (handle, i.pointer))
    })
}

/// An event is closed: nobody waits with it.
pub fn forget_event(event: efi::Event) {
    DATABASE.with(|d| d.registrations.retain(|r| r.event != event));
}

/// Removes every opening that an agent made (its image is unloaded).
pub fn forget_agent(agent: efi::Handle) {
    DATABASE.with(|d| {
        for i in d.handles.iter_mut().flat_map(|h| &mut h.interfaces) {
            i.openings.retain(|o| o.agent != agent);
        }
    });
}

/// GUID of the driver binding protocol.
fn driver_binding_guid() -> Guid {
    Guid(*driver_binding::PROTOCOL_GUID.as_bytes())
}

/// ConnectController: drivers given first, then all by version; with `recursive`, the children too. Bus drivers get `rest`, the
/// path of the one child that is wanted (null: all).
pub fn connect(
    controller: efi::Handle,
    first: &[efi::Handle],
    rest: *mut device_path::Protocol,
    recursive: bool,
) -> Result<(), Status> {
    if !is_valid(controller) {
        return Err(Status::INVALID_PARAMETER);
    }
    let guid = driver_binding_guid();
    let binding = |h: efi::Handle| get(h, &guid).ok().map(|p| p.cast::<driver_binding::Protocol>());
    let mut bindings: Vec<*mut driver_binding::Protocol> = first.iter().filter_map(|h| binding(*h)).collect();
    let mut others: Vec<_> = with_protocol(&guid).into_iter().filter_map(binding).collect();
    // SAFETY: an installed driver binding points at a live protocol structure.
    others.sort_by_key(|b| core::cmp::Reverse(unsafe { (**b).version }));
    for b in others {
        if !bindings.contains(&b) {
            bindings.push(b);
        }
    }
    let mut started = false;
    // What one driver brings another may be waiting for: those that have not started are asked again.
    loop {
        let before = bindings.len();
        bindings.retain(|b| {
            let b = *b;
            // SAFETY: as above; the functions are the driver's own, called as the specification says.
            let good = unsafe {
                ((*b).supported)(b, controller, rest) == Status::SUCCESS
                    && ((*b).start)(b, controller, rest) == Status::SUCCESS
            };
            started |= good;
            !good
        });
        if bindings.is_empty() || bindings.len() == before {
            break;
        }
    }
    if recursive {
        for child in children(controller) {
            let _ = connect(child, &[], core::ptr::null_mut(), true);
        }
    }
    // No child is wanted where the path is at its end: then it is no failure that nobody started.
    // SAFETY: the caller passes a device path or null.
    let wants_none = !rest.is_null() && unsafe { rest.cast::<u8>().read() } & 0x7f == 0x7f;
    if started || wants_none { Ok(()) } else { Err(Status::NOT_FOUND) }
}

fn children(controller: efi::Handle) -> Vec<efi::Handle> {
    DATABASE.with(|d| {
        let Some(h) = d.find(controller) else { return Vec::new() };
        let openings = h.interfaces.iter().flat_map(|i| &i.openings);
        let mut found: Vec<efi::Handle> =
            openings.filter(|o| o.attributes & BY_CHILD_CONTROLLER != 0).map(|o| o.controller).collect();
        found.sort();
        found.dedup();
        found
    })
}

/// DisconnectController: one driver or all; one child or all.
pub fn disconnect(controller: efi::Handle, driver: efi::Handle, child: efi::Handle) -> Result<(), Status> {
    if !is_valid(controller) || !driver.is_null() && !is_valid(driver) || !child.is_null() && !is_valid(child) {
        return Err(Status::INVALID_PARAMETER);
    }
    let agents: Vec<efi::Handle> = DATABASE.with(|d| {
        let Some(h) = d.find(controller) else { return Vec::new() };
        let openings = h.interfaces.iter().flat_map(|i| &i.openings);
        let mut found: Vec<efi::Handle> = openings
            .filter(|o| o.attributes & BY_DRIVER != 0 && (driver.is_null() || o.agent == driver))
            .map(|o| o.agent)
            .collect();
        found.sort();
        found.dedup();
        found
    });
    let guid = driver_binding_guid();
    if !driver.is_null() && get(driver, &guid).is_err() {
        return Err(Status::INVALID_PARAMETER);
    }
    // Nobody manages it, or not this driver: that is what the caller wanted (UEFI 2.10, section 7.3.13).
    let mut stopped = agents.is_empty();
    for agent in agents {
        let Ok(b) = get(agent, &guid) else { continue };
        let b = b.cast::<driver_binding::Protocol>();
        let mut list: Vec<efi::Handle> = DATABASE.with(|d| {
            let Some(h) = d.find(controller) else { return Vec::new() };
            let openings = h.interfaces.iter().flat_map(|i| &i.openings);
            openings
                .filter(|o| o.attributes & BY_CHILD_CONTROLLER != 0 && o.agent == agent)
                .map(|o| o.controller)
                .collect()
        });
        let all = list.len();
        if !child.is_null() {
            list.retain(|c| *c == child);
        }
        // SAFETY: as in `connect`.
        unsafe {
            let mut good = true;
            if !list.is_empty() {
                good = ((*b).stop)(b, controller, list.len(), list.as_mut_ptr()) == Status::SUCCESS;
            }
            if good && (child.is_null() || all == list.len()) {
                good = ((*b).stop)(b, controller, 0, core::ptr::null_mut()) == Status::SUCCESS;
            }
            stopped |= good;
        }
    }
    if stopped { Ok(()) } else { Err(Status::DEVICE_ERROR) }
}
