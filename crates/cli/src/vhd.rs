//! `viridian vhd`: virtual hard disks as files.

use crate::progress;
use clap::{Args as ClapArgs, Subcommand, ValueEnum};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use vhd::{BenchOptions, CheckReport, CreateOptions, DiskType, Error, Format, ImageInfo, Io, Severity};
use vmms::size;

/// Arguments.
#[derive(ClapArgs)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Make a new image
    New(NewArgs),
    /// Show what an image is
    Info(LookArgs),
    /// Check an image and its chain of parents; status 1 if something is wrong
    Check(LookArgs),
    /// Copy an image into a new one of another format or type
    Convert(ConvertArgs),
    /// Change the size of a disk
    Resize(ResizeArgs),
    /// Merge a differencing image into its parent and remove it
    Merge(ImageArgs),
    /// Write an image anew without the space that it does not use
    Compact(ImageArgs),
    /// Name another file as the parent of a differencing image
    Reparent(ReparentArgs),
    /// Time a stream of requests, with the options of `qemu-img bench`
    #[command(hide = true)]
    Bench(BenchArgs),
}

#[derive(ClapArgs)]
struct NewArgs {
    /// The new file; its name's ending (.vhdx, .vhd, .img) says the format
    path: PathBuf,
    /// Size: a number with K, M, G or T (without a letter: MiB); of a differencing image the parent's, if left out
    #[arg(value_parser = size::parse, required_unless_present = "parent")]
    size: Option<u64>,
    /// Format, if the name does not say it
    #[arg(long, value_enum)]
    format: Option<FormatArg>,
    /// Allocate all space at once
    #[arg(long, conflicts_with = "parent")]
    fixed: bool,
    /// Make a differencing image over this one
    #[arg(long, value_name = "FILE")]
    parent: Option<PathBuf>,
    #[command(flatten)]
    layout: LayoutArgs,
}

#[derive(ClapArgs)]
struct LayoutArgs {
    /// Block size, such as 2M [default: 32M for VHDX, 2M for VHD and differencing images]
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    block_size: Option<u64>,
    /// Bytes in a logical sector: 512 or 4096
    #[arg(long, value_name = "BYTES")]
    sector_size: Option<u32>,
    /// Bytes in a physical sector: 512 or 4096
    #[arg(long, value_name = "BYTES")]
    physical_sector_size: Option<u32>,
}

#[derive(ClapArgs)]
struct LookArgs {
    /// The image
    path: PathBuf,
    /// Format, if the name does not say it
    #[arg(long, value_enum)]
    format: Option<FormatArg>,
    /// Answer in JSON
    #[arg(long)]
    json: bool,
}

#[derive(ClapArgs)]
struct ImageArgs {
    /// The image
    path: PathBuf,
    /// Format, if the name does not say it
    #[arg(long, value_enum)]
    format: Option<FormatArg>,
}

#[derive(ClapArgs)]
struct ConvertArgs {
    /// The image to copy; of a differencing image, the disk that its chain shows
    source: PathBuf,
    /// The new file
    target: PathBuf,
    /// Format of the source, if its name does not say it
    #[arg(long, value_enum)]
    source_format: Option<FormatArg>,
    /// Format of the new file, if its name does not say it
    #[arg(long, value_enum)]
    format: Option<FormatArg>,
    /// Allocate all space at once
    #[arg(long)]
    fixed: bool,
    #[command(flatten)]
    layout: LayoutArgs,
}

#[derive(ClapArgs)]
struct ResizeArgs {
    #[command(flatten)]
    image: ImageArgs,
    /// The new size, or `min` for the smallest that loses no partition
    size: String,
    /// Cut off data
    #[arg(long)]
    force: bool,
}

#[derive(ClapArgs)]
struct ReparentArgs {
    #[command(flatten)]
    image: ImageArgs,
    /// The new parent
    parent: PathBuf,
    /// Take the parent even if it is not the one that the image was made from; the disk may then show wrong data
    #[arg(long)]
    ignore_identity: bool,
}

#[derive(ClapArgs)]
struct BenchArgs {
    path: PathBuf,
    #[arg(short = 'f', value_enum)]
    format: Option<FormatArg>,
    #[arg(short, default_value_t = 75000)]
    count: u64,
    #[arg(short, default_value_t = 64)]
    depth: usize,
    #[arg(short, default_value_t = 4096)]
    size: u64,
    #[arg(short = 'S', default_value_t = 0)]
    step: u64,
    #[arg(short, default_value_t = 0)]
    offset: u64,
    #[arg(short)]
    write: bool,
    /// `none` (direct I/O) or `writeback`
    #[arg(short = 't', default_value = "writeback")]
    cache: String,
    /// `inline`, `uring`, `threads` or `blocking`
    #[arg(short = 'i', default_value = "inline")]
    io: String,
}

#[derive(Clone, Copy, ValueEnum)]
enum FormatArg {
    Vhdx,
    #[value(alias = "vpc")]
    Vhd,
    Raw,
    Iso,
}

impl From<FormatArg> for Format {
    fn from(f: FormatArg) -> Self {
        match f {
            FormatArg::Vhdx => Self::Vhdx,
            FormatArg::Vhd => Self::Vhd,
            FormatArg::Raw => Self::Raw,
            FormatArg::Iso => Self::Iso,
        }
    }
}

/// Carries out the command.
pub fn run(args: Args) -> ExitCode {
    let result = match args.command {
        Command::New(a) => new(a),
        Command::Info(a) => info(&a),
        Command::Check(a) => return check(&a),
        Command::Convert(a) => convert(a),
        Command::Resize(a) => resize(&a),
        Command::Merge(a) => progress::counted("Merging", |p| vhd::merge(&a.path, a.format.map(Into::into), p)),
        Command::Compact(a) => progress::counted("Compacting", |p| vhd::compact(&a.path, a.format.map(Into::into), p)),
        Command::Reparent(a) => {
            vhd::reparent(&a.image.path, a.image.format.map(Into::into), &a.parent, a.ignore_identity)
        }
        Command::Bench(a) => bench(&a),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => failed(&e),
    }
}

fn failed(e: &Error) -> ExitCode {
    eprintln!("viridian: {e}");
    match e {
        Error::Parameter(_) | Error::Parent { .. } | Error::Malformed { .. } | Error::Unsupported(_) => {
            ExitCode::from(2)
        }
        _ => ExitCode::from(1),
    }
}

fn format_of(path: &Path, named: Option<FormatArg>) -> Result<Format, Error> {
    named.map(Into::into).or_else(|| Format::from_name(path)).ok_or_else(|| {
        Error::Parameter(format!("{}: the name says no format (.vhdx, .vhd, .img); give --format", path.display()))
    })
}

fn options(format: Format, layout: &LayoutArgs) -> Result<CreateOptions, Error> {
    let block_size = u32::try_from(layout.block_size.unwrap_or(0))
        .map_err(|_| Error::Parameter("the block size is at most 256M".into()))?;
    Ok(CreateOptions {
        format,
        block_size,
        logical_sector_size: layout.sector_size.unwrap_or(0),
        physical_sector_size: layout.physical_sector_size.unwrap_or(0),
        ..CreateOptions::dynamic_vhdx(0)
    })
}

fn disk_type(format: Format, fixed: bool) -> DiskType {
    if fixed || format == Format::Raw { DiskType::Fixed } else { DiskType::Dynamic }
}

fn new(a: NewArgs) -> Result<(), Error> {
    let format = format_of(&a.path, a.format)?;
    let mut o = options(format, &a.layout)?;
    o.size = a.size.unwrap_or(0);
    o.disk_type = if a.parent.is_some() { DiskType::Differencing } else { disk_type(format, a.fixed) };
    o.parent = a.parent;
    vhd::create(&a.path, &o)
}

fn convert(a: ConvertArgs) -> Result<(), Error> {
    let format = format_of(&a.target, a.format)?;
    let mut o = options(format, &a.layout)?;
    o.disk_type = disk_type(format, a.fixed);
    progress::counted("Converting", |p| vhd::convert(&a.source, a.source_format.map(Into::into), &a.target, &o, p))
}

fn resize(a: &ResizeArgs) -> Result<(), Error> {
    let format = a.image.format.map(Into::into);
    let size = if a.size == "min" {
        vhd::minimum_size(&a.image.path, format)?
    } else {
        size::parse(&a.size).map_err(|e| Error::Parameter(format!("size {}: {e}", a.size)))?
    };
    progress::counted("Resizing", |p| vhd::resize(&a.image.path, format, size, a.force, p))
}

/// Bytes for people: exact, and rounded down to a unit.
fn bytes(n: u64) -> String {
    let mut unit = (n, "bytes");
    for (shift, name) in [(10, "KiB"), (20, "MiB"), (30, "GiB"), (40, "TiB")] {
        if n >> shift != 0 {
            unit = (n >> shift, name);
        }
    }
    if unit.1 == "bytes" { format!("{n} bytes") } else { format!("{} {} ({n} bytes)", unit.0, unit.1) }
}

fn info(a: &LookArgs) -> Result<(), Error> {
    let i = vhd::info(&a.path, a.format.map(Into::into))?;
    if a.json {
        println!("{}", info_json(&i));
        return Ok(());
    }
    println!("image         {}", i.path.display());
    println!("format        {}, {}", i.format, i.disk_type);
    println!("disk size     {}", bytes(i.size));
    println!("file size     {}", bytes(i.file_size));
    println!("on the host   {}", bytes(i.allocated));
    if i.block_size != 0 {
        println!("block size    {}", bytes(u64::from(i.block_size)));
    }
    println!("sectors       {} bytes logical, {} physical", i.logical_sector_size, i.physical_sector_size);
    println!("disk id       {}", i.disk_id);
    println!("identity      {}", i.link_id);
    for p in &i.parent_candidates {
        println!("parent        {}{}", p.display(), if p.is_file() { "" } else { " (not found)" });
    }
    if i.log_pending {
        println!("log           holds updates; the next opening for writing replays them");
    }
    println!("in use        {}", if i.in_use { "yes" } else { "no" });
    Ok(())
}

fn info_json(i: &ImageInfo) -> serde_json::Value {
    serde_json::json!({
        "path": i.path,
        "format": i.format.to_string().to_lowercase(),
        "type": i.disk_type.to_string(),
        "size": i.size,
        "file_size": i.file_size,
        "allocated": i.allocated,
        "block_size": i.block_size,
        "logical_sector_size": i.logical_sector_size,
        "physical_sector_size": i.physical_sector_size,
        "disk_id": i.disk_id.to_string(),
        "identity": i.link_id.to_string(),
        "parent_candidates": i.parent_candidates,
        "log_pending": i.log_pending,
        "in_use": i.in_use,
    })
}

fn check(a: &LookArgs) -> ExitCode {
    let report = match vhd::check(&a.path, a.format.map(Into::into)) {
        Ok(r) => r,
        Err(e) => return failed(&e),
    };
    if a.json {
        println!("{}", check_json(&report));
    } else {
        for f in &report.findings {
            println!("{}: {}: {}", severity(f.severity), f.structure, f.detail);
        }
        if report.more != 0 {
            println!("and {} more", report.more);
        }
        let verdict = if report.is_clean() { "no errors" } else { "errors found" };
        println!("{verdict}; {} of {} blocks are allocated", report.allocated_blocks, report.total_blocks);
    }
    if report.is_clean() { ExitCode::SUCCESS } else { ExitCode::from(1) }
}

fn severity(s: Severity) -> &'static str {
    match s {
        Severity::Note => "note",
        Severity::Warning => "warning",
        Severity::Error => "error",
    }
}

fn check_json(r: &CheckReport) -> serde_json::Value {
    let findings: Vec<_> = r
        .findings
        .iter()
        .map(|f| {
            serde_json::json!({
                "severity": severity(f.severity), "structure": f.structure.to_string(), "detail": f.detail,
            })
        })
        .collect();
    serde_json::json!({
        "clean": r.is_clean(),
        "errors": r.errors,
        "findings": findings,
        "more_findings": r.more,
        "allocated_blocks": r.allocated_blocks,
        "total_blocks": r.total_blocks,
        "leaked_bytes": r.leaked_bytes,
        "log_pending": r.log_pending,
    })
}

fn bench(a: &BenchArgs) -> Result<(), Error> {
    let io = match a.io.as_str() {
        "inline" => Io::Inline,
        "uring" => Io::Uring,
        "threads" => Io::Threads,
        "blocking" => Io::Blocking,
        other => return Err(Error::Parameter(format!("{other}: expected inline, uring, threads or blocking"))),
    };
    let took = vhd::bench(
        &a.path,
        &BenchOptions {
            format: a.format.map(Into::into),
            count: a.count,
            depth: a.depth,
            size: a.size,
            step: a.step,
            offset: a.offset,
            write: a.write,
            direct: a.cache == "none",
            io,
        },
    )?;
    println!("Run completed in {:.3} seconds.", took.as_secs_f64());
    Ok(())
}
