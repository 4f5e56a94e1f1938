//! Power cuts at thousands of moments under a mixed workload: every image opens, checks clean and holds all that was
//! flushed.
//!
//! `VIRIDIAN_POWERCUT_ROUNDS` (default 2) is the number of workloads for each kind of image.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use super::Rng;
use super::sim::{Content, SimFile};
use crate::driver::threads::perform;
use crate::image::{self, DiskType, Format};
use crate::ops::check::check_storage;
use crate::ops::create::write_structures;
use crate::state::{Core, Op, OpKind, RequestKind};
use crate::{Completion, CreateOptions, IoBuffer};

const MIB: u64 = 1 << 20;

/// One write (or zeroing) of a sector.
#[derive(Debug, Clone, Copy)]
struct Version {
    /// 0 is zeros.
    stamp: u64,
    submitted: usize,
    /// When it ended, by the history's clock.
    completed: u64,
    /// Written with force unit access: durable from here on.
    durable: usize,
    /// Of a fixed or differencing image's unmap: old content, anything before and zeros are all right.
    any: bool,
}

/// A flush: when it was submitted, by the history's clock, and where in the journal it was complete.
#[derive(Debug, Clone, Copy)]
struct Flush {
    submitted: u64,
    completed: usize,
}

#[derive(Default)]
struct History {
    sectors: BTreeMap<u64, Vec<Version>>,
    flushes: Vec<Flush>,
    /// Counts submissions and ends. Positions in the journal do not order what writes nothing, as unmapping a block.
    clock: u64,
}

fn stamp_sector(buf: &mut [u8], lba: u64, stamp: u64) {
    if stamp == 0 {
        buf.fill(0);
        return;
    }
    for (i, c) in buf.chunks_mut(16).enumerate() {
        c[..8].copy_from_slice(&(lba << 8 | i as u64 & 0xff).to_le_bytes());
        c[8..].copy_from_slice(&stamp.to_le_bytes());
    }
}

/// A disk on simulated files, driven one operation at a time in random order.
struct Machine {
    core: Core,
    file: Arc<SimFile>,
    parents: Vec<Arc<SimFile>>,
    /// Operations under way, with the journal's length when they were issued.
    pending: Vec<(Op, usize)>,
    sector: u64,
}

impl Machine {
    fn open(file: Arc<SimFile>, parents: &[Arc<SimFile>], format: Format, write: bool) -> crate::Result<Self> {
        let first = image::open(file.clone(), format, write)?;
        let sector = first.facts.logical_sector;
        let mut layers = vec![first.layer];
        for p in parents {
            layers.push(image::open(p.clone(), format, false)?.layer);
        }
        let core = Core::new(layers, first.writer, sector);
        Ok(Self { core, file, parents: parents.to_vec(), pending: Vec::new(), sector: u64::from(sector) })
    }

    fn gather(&mut self) {
        let at = self.file.journal_len();
        self.pending.extend(self.core.out.drain(..).map(|o| (o, at)));
        for d in std::mem::take(&mut self.core.done) {
            (d.0)(d.1);
        }
    }

    /// Carries out one operation.
    fn step(&mut self, rng: &mut Rng) -> bool {
        self.gather();
        if self.pending.is_empty() {
            return false;
        }
        let (op, issued) = self.pending.swap_remove(rng.below(self.pending.len() as u64) as usize);
        let result = if op.kind == OpKind::Sync && op.layer == 0 {
            // It covers what was written before it was issued; what came between may be lost.
            self.file.sync_from(issued);
            Ok(0)
        } else if op.layer == 0 {
            perform(&*self.file, &op)
        } else {
            perform(&*self.parents[op.layer - 1], &op)
        };
        self.core.complete(op.id, result);
        self.gather();
        true
    }

    fn run(&mut self, rng: &mut Rng) {
        while self.step(rng) {}
        assert!(self.core.is_idle(), "nothing is pending, but requests are");
    }

    fn request(
        &mut self,
        kind: RequestKind,
        off: u64,
        len: u64,
        buf: Option<IoBuffer>,
    ) -> Arc<Mutex<Option<Completion>>> {
        let slot = Arc::new(Mutex::new(None));
        let put = slot.clone();
        self.core.submit(kind, off, len, buf, Box::new(move |c| *put.lock().unwrap() = Some(c)));
        self.gather();
        slot
    }

    fn read(&mut self, off: u64, len: u64) -> Vec<u8> {
        let slot = self.request(RequestKind::Read, off, len, Some(IoBuffer::from_vec(vec![0xcc; len as usize])));
        self.run(&mut Rng::new(1));
        let c = slot.lock().unwrap().take().expect("the read ended");
        c.result.expect("reads");
        c.buffer.expect("its buffer").into_vec()
    }

    fn close(&mut self, rng: &mut Rng) {
        let flushed = self.request(RequestKind::Flush, 0, 0, None);
        self.run(rng);
        flushed.lock().unwrap().take().expect("the flush ended").result.expect("flushes");
        let Core { writer, layers, failed, .. } = &mut self.core;
        writer.close(&*layers[0].storage, *failed).expect("closes");
    }
}

/// What a request in flight changes when it ends.
struct Flying {
    slot: Arc<Mutex<Option<Completion>>>,
    kind: RequestKind,
    first: u64,
    count: u64,
    /// By the history's clock.
    submitted: u64,
}

/// Whether a workload unmaps and zeroes, and what unmapping promises.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Zeroing {
    None,
    /// Unmapped sectors read as zeros.
    Exact,
    /// Unmapping may do nothing.
    Advisory,
}

/// Random requests, up to eight at a time, never two on the same sectors; returns what may be found after a cut.
fn workload(m: &mut Machine, h: &mut History, rng: &mut Rng, requests: u32, next_stamp: &mut u64, zeroing: Zeroing) {
    let total = m.core.size() / m.sector;
    let mut flying: Vec<Flying> = Vec::new();
    let mut left = requests;
    while left > 0 || !flying.is_empty() {
        let now = m.file.journal_len();
        flying.retain(|f| {
            let Some(c) = f.slot.lock().unwrap().take() else { return true };
            c.result.expect("succeeds");
            h.clock += 1;
            if f.kind == RequestKind::Flush || f.kind == (RequestKind::Write { fua: true }) {
                h.flushes.push(Flush { submitted: f.submitted, completed: now });
            }
            for lba in f.first..f.first + f.count {
                let v = h.sectors.get_mut(&lba).and_then(|v| v.last_mut()).expect("it was submitted");
                v.completed = h.clock;
                if f.kind == (RequestKind::Write { fua: true }) {
                    v.durable = now;
                }
            }
            false
        });
        if left > 0 && flying.len() < 8 && rng.below(3) > 0 {
            left -= 1;
            let hot = rng.below(2) == 0;
            let mut first = if hot { rng.below(total.min(6000)) } else { rng.below(total) };
            let mut count = 1 + rng.below(24);
            let kind = match rng.below(100) {
                0..=17 => RequestKind::Flush,
                18..=24 if zeroing != Zeroing::None => RequestKind::WriteZeroes,
                25..=31 if zeroing != Zeroing::None => RequestKind::Unmap,
                32..=37 => RequestKind::Write { fua: true },
                _ => RequestKind::Write { fua: false },
            };
            if kind == RequestKind::Flush {
                count = 0;
            } else if matches!(kind, RequestKind::Unmap | RequestKind::WriteZeroes) && rng.below(2) == 0 {
                // Whole blocks, which are given up.
                let per = MIB / m.sector;
                first = first / per * per;
                count = per * (1 + rng.below(2));
            }
            count = count.min(total - first);
            if flying.iter().any(|f| f.first < first + count && first < f.first + f.count) {
                continue;
            }
            let submitted = m.file.journal_len();
            h.clock += 1;
            *next_stamp += 1;
            let write = matches!(kind, RequestKind::Write { .. });
            let mut data = vec![0; if write { (count * m.sector) as usize } else { 0 }];
            for i in 0..count {
                let lba = first + i;
                let any = kind == RequestKind::Unmap && zeroing == Zeroing::Advisory;
                let stamp = if write { *next_stamp } else { 0 };
                let versions = h.sectors.entry(lba).or_default();
                // Whole-block zeroing touches many sectors that never had anything.
                versions.push(Version { stamp, submitted, completed: u64::MAX, durable: usize::MAX, any });
                if write {
                    let at = (i * m.sector) as usize;
                    stamp_sector(&mut data[at..at + m.sector as usize], lba, stamp);
                }
            }
            let buf = write.then(|| IoBuffer::from_vec(data));
            let slot = m.request(kind, first * m.sector, count * m.sector, buf);
            flying.push(Flying { slot, kind, first, count, submitted: h.clock });
        } else {
            m.step(rng);
        }
    }
}

/// Compares a disk with what is possible after a cut.
fn verify(m: &mut Machine, h: &History, cut: usize, floor_of: &BTreeMap<u64, u64>, what: &str) {
    let sector = m.sector;
    let lbas: Vec<u64> = h.sectors.keys().copied().collect();
    let mut expected = vec![0; sector as usize];
    let mut i = 0;
    while i < lbas.len() {
        // Neighbours are read together.
        let mut n = 1;
        while i + n < lbas.len() && lbas[i + n] == lbas[i] + n as u64 && n < 2048 {
            n += 1;
        }
        let data = m.read(lbas[i] * sector, n as u64 * sector);
        for (k, got) in data.chunks(sector as usize).enumerate() {
            let lba = lbas[i + k];
            if (lba + 1) * sector == m.core.size() {
                // `recover` writes here.
                continue;
            }
            let versions = &h.sectors[&lba];
            let mut floor = versions.iter().rposition(|v| v.durable <= cut);
            for f in h.flushes.iter().filter(|f| f.completed <= cut) {
                let newest = versions.iter().rposition(|v| v.completed <= f.submitted);
                floor = floor.max(newest);
            }
            let old = floor_of.get(&lba).copied().unwrap_or(0);
            let first = floor.unwrap_or(0);
            let mut allowed: Vec<u64> =
                versions[first..].iter().filter(|v| v.submitted <= cut).map(|v| v.stamp).collect();
            if floor.is_none() {
                allowed.push(old);
            }
            if versions[first..].iter().any(|v| v.any) {
                // An unmap of a differencing image may leave what was there.
                allowed.extend(versions[..first].iter().map(|v| v.stamp).chain([old, 0]));
            }
            let ok = allowed.iter().any(|&s| {
                stamp_sector(&mut expected, lba, s);
                got == &expected[..]
            });
            if !ok {
                let stamp = u64::from_le_bytes(got[8..16].try_into().unwrap());
                panic!("{what}, cut {cut}: sector {lba} holds stamp {stamp}, allowed {allowed:?}; {versions:?}");
            }
        }
        i += n;
    }
}

pub(super) fn new_image(o: &CreateOptions) -> Content {
    let f = SimFile::new(Content::default());
    write_structures(&*f, std::path::Path::new("simulated"), o, None, Vec::new()).expect("creates");
    f.now()
}

pub(super) fn options(format: Format, disk_type: DiskType, size: u64, block_size: u32, sector: u32) -> CreateOptions {
    CreateOptions {
        format,
        disk_type,
        size,
        block_size,
        logical_sector_size: sector,
        physical_sector_size: sector,
        ..CreateOptions::dynamic_vhdx(size)
    }
}

/// A child over `parent`, made by hand because there are no paths here.
pub(super) fn new_child(o: &CreateOptions, parent: &Arc<SimFile>) -> Content {
    let facts = image::open(parent.clone(), o.format, false).expect("opens the parent").facts;
    let f = SimFile::new(Content::default());
    let at = std::env::current_exe().expect("a file that exists");
    write_structures(&*f, &at, o, Some((&at, &facts)), Vec::new()).expect("creates");
    f.now()
}

fn rounds() -> u64 {
    std::env::var("VIRIDIAN_POWERCUT_ROUNDS").ok().and_then(|s| s.parse().ok()).unwrap_or(2)
}

/// Runs workloads on an image, cuts power at many moments of each, and once more while the image recovers.
fn cut_everywhere(name: &str, format: Format, content: &Content, parents: &[Arc<SimFile>], old: &BTreeMap<u64, u64>) {
    let mut cuts = 0;
    let facts = image::open(SimFile::new(content.clone()), format, false).expect("opens").facts;
    let zeroing = if facts.disk_type == DiskType::Dynamic { Zeroing::Exact } else { Zeroing::Advisory };
    for round in 0..rounds() {
        let mut rng = Rng::new(round * 1000 + 17);
        let file = SimFile::new(content.clone());
        let mut m = Machine::open(file.clone(), parents, format, true).expect("opens");
        let mut h = History::default();
        let mut stamp = 1 << 32;
        workload(&mut m, &mut h, &mut rng, 120, &mut stamp, zeroing);
        m.close(&mut rng);
        let end = file.journal_len();
        for _ in 0..120 {
            let cut = rng.below(end as u64 + 1) as usize;
            let what = format!("{name}, round {round}");
            let crashed = SimFile::new(file.crash(cut, &mut rng, m.sector));
            recover(&what, format, crashed.clone(), parents, &h, cut, old);
            // The recovery (log replay) is cut, too.
            let again = crashed.journal_len();
            if again > 0 && rng.below(2) == 0 {
                let twice = SimFile::new(crashed.crash(rng.below(again as u64 + 1) as usize, &mut rng, m.sector));
                recover(&format!("{what}, cut twice"), format, twice, parents, &h, cut, old);
            }
            cuts += 1;
        }
    }
    println!("{name}: {cuts} cuts");
}

fn recover(
    what: &str,
    format: Format,
    file: Arc<SimFile>,
    parents: &[Arc<SimFile>],
    h: &History,
    cut: usize,
    old: &BTreeMap<u64, u64>,
) {
    // Read-only first: the log is laid over, not replayed.
    let untouched = SimFile::new(file.now());
    let mut m = Machine::open(untouched, parents, format, false).unwrap_or_else(|e| panic!("{what}, cut {cut}: {e}"));
    verify(&mut m, h, cut, old, what);
    let mut m = Machine::open(file.clone(), parents, format, true).unwrap_or_else(|e| panic!("{what}, cut {cut}: {e}"));
    let report = check_storage(file.clone(), format).expect("is readable");
    assert!(report.is_clean(), "{what}, cut {cut}: {:?}", report.findings);
    verify(&mut m, h, cut, old, what);
    // And it can be written again.
    let size = m.core.size();
    let slot = m.request(
        RequestKind::Write { fua: true },
        size - m.sector,
        m.sector,
        Some(IoBuffer::from_vec(vec![9; m.sector as usize])),
    );
    m.run(&mut Rng::new(cut as u64));
    slot.lock().unwrap().take().expect("the write ended").result.expect("writes");
    let report = check_storage(SimFile::new(file.now()), format).expect("is readable");
    assert!(report.is_clean(), "{what}, cut {cut}, after writing: {:?}", report.findings);
}

#[test]
fn power_cuts_on_dynamic_vhdx() {
    for sector in [512, 4096] {
        let o = options(Format::Vhdx, DiskType::Dynamic, 24 * MIB, 1 << 20, sector);
        cut_everywhere(&format!("dynamic VHDX/{sector}"), Format::Vhdx, &new_image(&o), &[], &BTreeMap::new());
    }
}

#[test]
fn power_cuts_on_fixed_images() {
    let o = options(Format::Vhdx, DiskType::Fixed, 8 * MIB, 1 << 20, 512);
    cut_everywhere("fixed VHDX", Format::Vhdx, &new_image(&o), &[], &BTreeMap::new());
    let o = options(Format::Vhd, DiskType::Fixed, 8 * MIB, 0, 512);
    cut_everywhere("fixed VHD", Format::Vhd, &new_image(&o), &[], &BTreeMap::new());
}

#[test]
fn power_cuts_on_dynamic_vhd() {
    for block in [64 << 10, 2 << 20] {
        let o = options(Format::Vhd, DiskType::Dynamic, 24 * MIB, block, 512);
        cut_everywhere(&format!("dynamic VHD/{block}"), Format::Vhd, &new_image(&o), &[], &BTreeMap::new());
    }
}

/// A parent with something in it, and the stamps that it holds.
fn parent(o: &CreateOptions) -> (Arc<SimFile>, BTreeMap<u64, u64>) {
    let mut rng = Rng::new(99);
    let file = SimFile::new(new_image(o));
    let mut m = Machine::open(file.clone(), &[], o.format, true).expect("opens");
    let mut h = History::default();
    let mut stamp = 0;
    workload(&mut m, &mut h, &mut rng, 300, &mut stamp, Zeroing::None);
    m.close(&mut rng);
    let stamps = h.sectors.iter().map(|(&lba, v)| (lba, v.last().map_or(0, |v| v.stamp))).collect();
    (SimFile::new(file.now()), stamps)
}

#[test]
fn power_cuts_on_differencing_images() {
    for (format, sector) in [(Format::Vhdx, 512), (Format::Vhdx, 4096), (Format::Vhd, 512)] {
        let (base, stamps) = parent(&options(format, DiskType::Dynamic, 24 * MIB, 2 << 20, sector));
        let mut o = options(format, DiskType::Differencing, 24 * MIB, 1 << 20, sector);
        o.parent = Some("parent".into());
        let child = new_child(&o, &base);
        cut_everywhere(&format!("differencing {format}/{sector}"), format, &child, &[base], &stamps);
    }
}
