//! `fio` in a guest: 4 KiB random reads, 32 at a time, from the same data in a dynamic VHDX on synthetic SCSI and in a raw
//! image on QEMU's virtio-scsi.

use super::super::Samples;
use super::super::table::{Table, figure};
use super::{Options, must};
use crate::guests::Guests;
use crate::initramfs::{self, Contents};
use crate::session::Session;
use crate::vm::{Contender, Vm};
use anyhow::{Context, Result};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

/// MiB of the disk: it stays in the host's page cache, so that the machines are measured and not the device.
const DISK_MIB: u64 = 256;

const SCRIPT: &str = "\
within 20 test -b /dev/sda
fio --name=warm --filename=/dev/sda --readonly --direct=1 --rw=read --bs=1M --output=/tmp/fio
for rw in randread randwrite; do
    fio --name=q --filename=/dev/sda --direct=1 --rw=$rw --bs=4k --ioengine=libaio --iodepth=32 --norandommap \\
        --time_based --ramp_time=1 --runtime=4 --minimal > /tmp/fio
    note \"iops $rw $(cut -d';' -f8,49 /tmp/fio | tr ';' ' ')\"
done
check true true
";

/// Runs both in turn and prints the table.
///
/// # Errors
/// When a guest does not come to its end.
pub fn run(viridian: &Path, kernel: &str, options: &Options) -> Result<()> {
    let guests = Guests::locate();
    guests.ensure(&[kernel, "busybox", "fio", "qemu"])?;
    let kernel = guests.kernel(kernel)?;
    let contents = Contents {
        modules: ["hv_vmbus", "sd_mod", "hv_storvsc", "virtio_pci", "virtio_scsi"].map(str::to_owned).into(),
        programs: vec![("fio".into(), "usr/bin/fio".into())],
        uncompressed: true,
        ..Contents::default()
    };
    let initrd = initramfs::build(&guests, &kernel, &contents)?;
    let script = base64::Engine::encode(&base64::engine::general_purpose::STANDARD, SCRIPT);
    let (raw, vhdx) = (options.folder.join("guest.img"), options.folder.join("guest.vhdx"));
    super::make_source(&raw, DISK_MIB / 2)?;
    let _ = std::fs::remove_file(&vhdx);
    must(Command::new(viridian).args(["vhd", "convert"]).arg(&raw).arg(&vhdx))?;
    let soft = Contender::Viridian { binary: viridian.into(), engine: "soft".into(), options: Vec::new() };
    let qemu = Contender::Qemu { tree: guests.tool("qemu") };
    let names = ["random reads", "random overwrites"];
    let mut table = Table::new(["IOPS in the guest, 4 KiB, depth 32", "viridian", "qemu-tcg", "ratio"]);
    for processors in [1, 2] {
        let mut figures: [[Samples; 2]; 2] = Default::default();
        let vm = Vm {
            kernel: kernel.image.clone(),
            initrd: initrd.clone(),
            append: format!("quiet viridian.run={script}"),
            memory_mib: 768,
            processors,
        };
        for _ in 0..options.runs.min(3) {
            for (i, contender) in [&soft, &qemu].into_iter().enumerate() {
                let mut command = contender.command(&vm);
                if i == 0 {
                    command.arg("--disk").arg(&vhdx);
                } else {
                    let drive = format!("if=none,id=disk,format=raw,file={}", raw.display());
                    command.args(["-device", "virtio-scsi-pci", "-drive", &drive, "-device", "scsi-hd,drive=disk"]);
                }
                for (j, iops) in one(command)?.into_iter().enumerate() {
                    figures[j][i].add(iops);
                }
            }
        }
        for (name, [ours, theirs]) in names.iter().zip(&figures) {
            let ratio = ours.median().zip(theirs.median()).map(|(a, b)| a / b);
            let name = format!("{name}, {processors} VP");
            table.row([name, figure(ours.median()), figure(theirs.median()), figure(ratio)]);
        }
    }
    print!("{}", table.render());
    for file in [raw, vhdx] {
        let _ = std::fs::remove_file(file);
    }
    Ok(())
}

/// IOPS of reads and of writes, as the guest's fio tells them.
fn one(command: Command) -> Result<[f64; 2]> {
    let mut session = Session::start(command, None, false)?;
    let limit = Duration::from_secs(180);
    let event = session.wait_for(limit, |t| t.contains("VIRIDIAN-VERDICT"))?;
    let found = |which: &str, field: usize| -> Option<f64> {
        let (_, rest) = session.text().split_once(&format!("iops {which} "))?;
        rest.split_whitespace().nth(field)?.parse().ok()
    };
    // fio's terse output: field 8 is IOPS of reads, field 49 of writes.
    let iops = found("randread", 0).zip(found("randwrite", 1));
    let iops = iops.with_context(|| format!("no figures of the guest ({event:?}): {}", tail(session.text())))?;
    session.finish(Duration::from_secs(30))?;
    Ok([iops.0, iops.1])
}

fn tail(text: &str) -> String {
    text.lines().rev().take(3).collect::<Vec<_>>().join(" | ")
}
