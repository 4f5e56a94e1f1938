//! The port and memory buses: which device answers which address.
//!
//! The tables are sorted and do not change while the machine exists, so looking an address up takes no lock.

use chipset::Device;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use thiserror::Error;

/// Two devices claim the same address.
#[derive(Debug, Error)]
#[error("devices '{first}' and '{second}' both claim {what}")]
pub struct Conflict {
    first: String,
    second: String,
    what: String,
}

struct Claim {
    first: u64,
    last: u64,
    slot: usize,
}

#[derive(Default)]
struct Counts {
    port_reads: AtomicU64,
    port_writes: AtomicU64,
    mmio_reads: AtomicU64,
    mmio_writes: AtomicU64,
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// How often a device was accessed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceCounts {
    /// The device, or "(none)" for addresses that nobody claims.
    pub name: String,
    /// IN, OUT, memory reads, memory writes.
    pub counts: [u64; 4],
}

/// Both buses.
pub struct Bus {
    devices: Vec<Arc<dyn Device>>,
    counts: Vec<Counts>,
    ports: Vec<Claim>,
    memory: Vec<Claim>,
    unclaimed: Counts,
}

fn sorted(mut claims: Vec<Claim>, devices: &[Arc<dyn Device>], bus: &str) -> Result<Vec<Claim>, Conflict> {
    claims.sort_by_key(|c| c.first);
    for pair in claims.windows(2) {
        if pair[1].first <= pair[0].last {
            return Err(Conflict {
                first: devices[pair[0].slot].name().into(),
                second: devices[pair[1].slot].name().into(),
                what: format!("{bus} {:#x}", pair[1].first),
            });
        }
    }
    Ok(claims)
}

fn find(claims: &[Claim], address: u64) -> Option<usize> {
    let i = claims.partition_point(|c| c.first <= address).checked_sub(1)?;
    (address <= claims[i].last).then_some(claims[i].slot)
}

impl Bus {
    /// The buses of these devices.
    pub fn new(devices: Vec<Arc<dyn Device>>) -> Result<Self, Conflict> {
        let (mut ports, mut memory) = (Vec::new(), Vec::new());
        for (slot, device) in devices.iter().enumerate() {
            for range in device.ports().map(|d| d.port_ranges()).unwrap_or_default() {
                ports.push(Claim { first: u64::from(*range.start()), last: u64::from(*range.end()), slot });
            }
            for range in device.mmio().map(|d| d.mmio_ranges()).unwrap_or_default() {
                memory.push(Claim { first: range.start, last: range.end.saturating_sub(1), slot });
            }
        }
        let ports = sorted(ports, &devices, "port")?;
        let memory = sorted(memory, &devices, "address")?;
        let counts = devices.iter().map(|_| Counts::default()).collect();
        Ok(Self { devices, counts, ports, memory, unclaimed: Counts::default() })
    }

    /// IN. An absent port reads as all ones.
    pub fn port_read(&self, port: u16, data: &mut [u8]) {
        if let Some(slot) = find(&self.ports, port.into())
            && let Some(device) = self.devices[slot].ports()
        {
            count(&self.counts[slot].port_reads);
            device.port_read(port, data);
        } else {
            count(&self.unclaimed.port_reads);
            data.fill(0xff);
        }
    }

    /// OUT.
    pub fn port_write(&self, port: u16, data: &[u8]) {
        if let Some(slot) = find(&self.ports, port.into())
            && let Some(device) = self.devices[slot].ports()
        {
            count(&self.counts[slot].port_writes);
            device.port_write(port, data);
        } else {
            count(&self.unclaimed.port_writes);
        }
    }

    /// Memory read. An absent address reads as all ones.
    pub fn mmio_read(&self, gpa: u64, data: &mut [u8]) {
        if let Some(slot) = find(&self.memory, gpa)
            && let Some(device) = self.devices[slot].mmio()
        {
            count(&self.counts[slot].mmio_reads);
            device.mmio_read(gpa, data);
        } else {
            count(&self.unclaimed.mmio_reads);
            data.fill(0xff);
        }
    }

    /// Memory write.
    pub fn mmio_write(&self, gpa: u64, data: &[u8]) {
        if let Some(slot) = find(&self.memory, gpa)
            && let Some(device) = self.devices[slot].mmio()
        {
            count(&self.counts[slot].mmio_writes);
            device.mmio_write(gpa, data);
        } else {
            count(&self.unclaimed.mmio_writes);
        }
    }

    /// The devices, in the order in which they start.
    pub fn devices(&self) -> &[Arc<dyn Device>] {
        &self.devices
    }

    /// Access counts of all devices and of unclaimed addresses.
    pub fn counts(&self) -> Vec<DeviceCounts> {
        let read = |name: &str, c: &Counts| DeviceCounts {
            name: name.into(),
            counts: [&c.port_reads, &c.port_writes, &c.mmio_reads, &c.mmio_writes].map(|c| c.load(Ordering::Relaxed)),
        };
        let mut all: Vec<_> = self.devices.iter().zip(&self.counts).map(|(d, c)| read(d.name(), c)).collect();
        all.push(read("(none)", &self.unclaimed));
        all
    }
}
