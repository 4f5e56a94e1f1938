//! A worker under attack: each trial is a process of its own that confines itself as a worker does and then tries what it
//! must not be able to do. The trials that must work show that the others fail for the sandbox's reasons.
//!
//! What this host cannot apply (an old kernel without Landlock, a container without user namespaces) is said, and its
//! trials are left out.

use engine_soft::direct::process::{self, MapOp, Process, Prot, Stop, Tsc};
use partition::MemoryBlock;
use std::fs::File;
use std::io::{ErrorKind, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Command, ExitCode};
use std::sync::Arc;
use viridian_worker::control::schema::Sandbox;
use viridian_worker::sandbox;

/// What must come of a trial.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Expect {
    /// It works.
    Allowed,
    /// The call fails with "permission denied".
    Refused,
    /// The process dies of SIGSYS.
    Killed,
}

/// Name, the measure that it is about, and what must come of it.
const TRIALS: &[(&str, &str, Expect)] = &[
    ("read-own", "landlock", Expect::Allowed),
    ("write-own-folder", "landlock", Expect::Allowed),
    ("thread", "seccomp", Expect::Allowed),
    ("read-passwd", "landlock", Expect::Refused),
    ("read-beside", "landlock", Expect::Refused),
    ("write-beside", "landlock", Expect::Refused),
    ("write-read-only", "landlock", Expect::Refused),
    ("read-parents-memory", "landlock", Expect::Refused),
    ("spawn", "seccomp", Expect::Refused),
    ("connect", "seccomp", Expect::Refused),
    ("tcp", "seccomp", Expect::Refused),
    ("kill-parent", "seccomp", Expect::Refused),
    ("make-folder", "seccomp", Expect::Refused),
    ("change-mode", "seccomp", Expect::Refused),
    ("vp-accepts", "seccomp", Expect::Refused),
    ("service-accepts", "seccomp", Expect::Allowed),
    ("vp-works", "seccomp", Expect::Allowed),
    ("vp-opens-own", "seccomp", Expect::Refused),
    ("vp-removes-own", "seccomp", Expect::Refused),
    ("vp-asks-for-a-file", "seccomp", Expect::Refused),
    ("writer-replaces", "seccomp", Expect::Allowed),
    ("writer-removes", "seccomp", Expect::Refused),
    ("writer-accepts", "seccomp", Expect::Refused),
    ("replace", "landlock", Expect::Allowed),
    ("replace-reads", "landlock", Expect::Refused),
    ("sockets-folder-writes", "landlock", Expect::Refused),
    ("socket-goes-away", "landlock", Expect::Allowed),
    ("direct-runs", "direct", Expect::Allowed),
    ("direct-attaches", "direct", Expect::Killed),
    ("direct-reads-memory", "direct", Expect::Killed),
    ("direct-spawns", "direct", Expect::Refused),
    ("direct-kills-parent", "direct", Expect::Refused),
    ("exec", "seccomp", Expect::Killed),
    ("trace", "seccomp", Expect::Killed),
    ("wait", "seccomp", Expect::Refused),
    ("unshare", "seccomp", Expect::Killed),
    ("regain-capabilities", "no-capabilities", Expect::Refused),
    ("keeps-its-user", "user-namespace", Expect::Allowed),
];

/// Status of a trial's process.
const REFUSED: u8 = 10;
const ALLOWED: u8 = 11;
const STRANGE: u8 = 12;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    // Test runners ask first what there is.
    if arguments.iter().any(|a| a == "--list") {
        if !arguments.iter().any(|a| a == "--ignored") {
            println!("a_worker_under_attack: test");
        }
        return ExitCode::SUCCESS;
    }
    if let [_, word, trial, folder] = arguments.as_slice()
        && word == "trial"
    {
        return attack(trial, Path::new(folder));
    }
    if trials() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn trials() -> bool {
    let dir = tempfile::tempdir().unwrap();
    let mut good = true;
    for folder in ["own", "beside", "replaced", "sockets"] {
        std::fs::create_dir(dir.path().join(folder)).unwrap();
        std::fs::write(dir.path().join(folder).join("file"), "text").unwrap();
    }
    std::fs::write(dir.path().join("read-only"), "text").unwrap();
    let missing = run("report", dir.path()).2;
    for (name, measure, expected) in TRIALS {
        if missing.lines().any(|l| l.starts_with(measure)) {
            println!("left out: {name} ({measure} is missing on this host)");
            continue;
        }
        let (status, signal, text) = run(name, dir.path());
        let came = match (status, signal) {
            (Some(code), _) if code == i32::from(REFUSED) => Some(Expect::Refused),
            (Some(code), _) if code == i32::from(ALLOWED) => Some(Expect::Allowed),
            (_, Some(31)) => Some(Expect::Killed),
            _ => None,
        };
        let right = came == Some(*expected);
        good &= right;
        let word = if right { "ok" } else { "FAILED" };
        println!("{word}: {name}: {expected:?} expected, came {came:?} ({status:?}, signal {signal:?}) {text}");
    }
    assert_eq!(std::fs::read_to_string(dir.path().join("beside/file")).unwrap(), "text");
    println!(
        "\ntest result: {}. {} passed; {} failed;",
        if good { "ok" } else { "FAILED" },
        u8::from(good),
        u8::from(!good)
    );
    good
}

fn run(trial: &str, folder: &Path) -> (Option<i32>, Option<i32>, String) {
    let child = Command::new(std::env::current_exe().unwrap()).arg("trial").arg(trial).arg(folder).output().unwrap();
    let text = String::from_utf8_lossy(&child.stdout).into_owned();
    (child.status.code(), child.status.signal(), text)
}

/// The status for what a call said.
fn verdict<T>(result: Result<T, std::io::Error>) -> ExitCode {
    ExitCode::from(match result {
        Ok(_) => ALLOWED,
        Err(e) if e.kind() == ErrorKind::PermissionDenied => REFUSED,
        Err(e) => {
            println!("{e}");
            STRANGE
        }
    })
}

/// Confines this process as a worker does; `processes`: whose engine uses processes, which `prepare` makes.
fn confined(dir: &Path, processes: bool, prepare: impl FnOnce()) -> Sandbox {
    let files = sandbox::Files {
        read: vec![dir.join("read-only")],
        write: vec![dir.join("own")],
        replace: vec![dir.join("replaced")],
        sockets: vec![dir.join("sockets")],
    };
    let mut report = sandbox::confine(&files);
    prepare();
    sandbox::filter(&mut report, processes);
    report
}

fn attack(trial: &str, dir: &Path) -> ExitCode {
    let listener = UnixListener::bind(dir.join("own").join(format!("{trial}.sock")));
    let _client = UnixStream::connect(dir.join("own").join(format!("{trial}.sock")));
    let parent = rustix::process::getppid();
    let outside_user = std::fs::metadata("/proc/self").map(|m| std::os::unix::fs::MetadataExt::uid(&m));
    let processes = trial.starts_with("direct-");
    let mut direct = Direct::none();
    let report = confined(dir, processes, || {
        if processes || trial == "report" {
            direct = Direct::new();
        }
    });
    let denied = || std::io::Error::from(ErrorKind::PermissionDenied);
    match trial {
        "report" => {
            report.missing.iter().for_each(|line| println!("{line}"));
            let seccomp = report.missing.iter().find(|line| line.starts_with("seccomp")).cloned();
            if let Some(why) = direct.0.err().map(|e| e.to_string()).or(seccomp) {
                println!("direct: {why}");
            }
            ExitCode::SUCCESS
        }
        "direct-runs" | "direct-attaches" | "direct-reads-memory" | "direct-spawns" | "direct-kills-parent" => {
            let (memory, mut process) = match direct.0 {
                Ok(made) => made,
                Err(error) => {
                    println!("{error}");
                    return ExitCode::from(STRANGE);
                }
            };
            if let Err(error) = sandbox::filter_vp(processes) {
                println!("{error}");
                return ExitCode::from(STRANGE);
            }
            let parent = parent.map_or(1, |p| p.as_raw_nonzero().get());
            let pid = |id: i32| nix::unistd::Pid::from_raw(id);
            match trial {
                "direct-runs" => verdict(run_directly(&memory, &mut process).inspect(|()| drop(process))),
                "direct-attaches" => verdict(nix::sys::ptrace::attach(pid(parent)).map_err(Into::into)),
                "direct-reads-memory" => {
                    let (id, at) = (process.id() as i32, Process::RESERVED.start as *mut _);
                    verdict(nix::sys::ptrace::read(pid(id), at).map_err(Into::into))
                }
                "direct-spawns" => verdict(Command::new("/bin/true").spawn()),
                _ => verdict(nix::sys::signal::kill(pid(parent), nix::sys::signal::SIGWINCH).map_err(Into::into)),
            }
        }
        "trace" => {
            let parent = parent.map_or(1, |p| p.as_raw_nonzero().get());
            verdict(nix::sys::ptrace::cont(nix::unistd::Pid::from_raw(parent), None).map_err(Into::into))
        }
        "wait" => verdict(nix::sys::wait::wait().map_err(Into::into)),
        "read-own" => verdict(std::fs::read(dir.join("read-only"))),
        "write-own-folder" => {
            let (new, named) = (dir.join("own/new"), dir.join("own/named"));
            verdict(
                std::fs::write(&new, "x")
                    .and_then(|()| std::fs::rename(&new, &named))
                    .and_then(|()| std::fs::remove_file(&named)),
            )
        }
        "thread" => verdict(std::thread::Builder::new().spawn(|| ()).and_then(|t| t.join().map_err(|_| denied()))),
        "read-passwd" => verdict(File::open("/etc/passwd")),
        "read-beside" => verdict(File::open(dir.join("beside/file"))),
        "write-beside" => verdict(File::create(dir.join("beside/file")).and_then(|mut f| f.write_all(b"broken"))),
        "write-read-only" => verdict(File::options().write(true).open(dir.join("read-only"))),
        "read-parents-memory" => {
            verdict(File::open(format!("/proc/{}/mem", parent.map_or(1, |p| p.as_raw_nonzero().get()))))
        }
        "spawn" => verdict(Command::new("/bin/true").spawn()),
        "connect" => verdict(UnixStream::connect(dir.join("own").join(format!("{trial}.sock")))),
        "tcp" => verdict(std::net::TcpStream::connect("127.0.0.1:1")),
        "kill-parent" => {
            let parent = parent.ok_or_else(denied);
            verdict(parent.and_then(|p| Ok(rustix::process::kill_process(p, rustix::process::Signal::WINCH)?)))
        }
        "make-folder" => verdict(std::fs::create_dir(dir.join("own/folder"))),
        "change-mode" => {
            let all = std::os::unix::fs::PermissionsExt::from_mode(0o777);
            verdict(std::fs::set_permissions(dir.join("own/file"), all))
        }
        "vp-accepts" => {
            if let Err(error) = sandbox::filter_vp(processes) {
                println!("{error}");
                return ExitCode::from(STRANGE);
            }
            verdict(listener.and_then(|l| l.accept()))
        }
        "vp-works" | "vp-opens-own" | "vp-removes-own" | "vp-asks-for-a-file" => {
            let mut open = File::options().append(true).open(dir.join("own/file"));
            if let Err(error) = sandbox::filter_vp(processes) {
                println!("{error}");
                return ExitCode::from(STRANGE);
            }
            match trial {
                // What is open already can be written, and the engine can make its thread for timers.
                "vp-works" => verdict(open.as_mut().map_err(|_| denied()).and_then(|file| {
                    file.write_all(b"log")?;
                    let thread = std::thread::Builder::new().spawn(std::time::Instant::now)?;
                    thread.join().map_err(|_| denied())
                })),
                "vp-opens-own" => verdict(File::open(dir.join("own/file"))),
                "vp-removes-own" => verdict(std::fs::remove_file(dir.join("own/file"))),
                _ => verdict(std::fs::metadata(dir.join("own/file"))),
            }
        }
        "writer-replaces" | "writer-removes" | "writer-accepts" => {
            if let Err(error) = sandbox::filter_writer() {
                println!("{error}");
                return ExitCode::from(STRANGE);
            }
            match trial {
                "writer-replaces" => verdict(bios::nvram::save(&dir.join("own/variables"), vec![1; 5000])),
                "writer-removes" => verdict(std::fs::remove_file(dir.join("own/file"))),
                _ => verdict(listener.and_then(|l| l.accept())),
            }
        }
        "replace" => verdict(bios::nvram::save(&dir.join("replaced/file"), vec![1; 5000])),
        "replace-reads" => verdict(std::fs::read(dir.join("replaced/file"))),
        "socket-goes-away" => verdict(std::fs::remove_file(dir.join("sockets/file"))),
        "sockets-folder-writes" => verdict(File::options().write(true).open(dir.join("sockets/file"))),
        "service-accepts" => verdict(listener.and_then(|l| l.accept())),
        "exec" => verdict::<()>(Err(Command::new("/bin/true").exec())),
        "unshare" => verdict(nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).map_err(Into::into)),
        "regain-capabilities" => {
            let all = rustix::thread::CapabilitySet::all();
            let sets = rustix::thread::CapabilitySets { effective: all, permitted: all, inheritable: all };
            verdict(rustix::thread::set_capabilities(None, sets).map_err(Into::into))
        }
        // The namespace knows the worker's own user, and files that it makes belong to that user outside too.
        "keeps-its-user" => {
            let made = File::create(dir.join("own/mine")).and_then(|f| f.metadata());
            let same = made.and_then(|m| {
                let owner = std::os::unix::fs::MetadataExt::uid(&m);
                outside_user.and_then(|uid| if uid == owner { Ok(()) } else { Err(denied()) })
            });
            verdict(same)
        }
        _ => ExitCode::from(STRANGE),
    }
}

/// What direct execution of guest code needs: memory of a guest, and a process.
struct Direct(Result<(Arc<MemoryBlock>, Process), std::io::Error>);

impl Direct {
    fn none() -> Self {
        Self(Err(ErrorKind::Other.into()))
    }

    fn new() -> Self {
        let make = || {
            let memory = MemoryBlock::new(1 << 20, true).map_err(std::io::Error::other)?;
            let process = Process::spawn(&memory.fd().into_iter().collect::<Vec<_>>(), Tsc::Host)?;
            Ok((memory, process))
        };
        Self(make())
    }
}

/// Everything that an engine does with a process.
fn run_directly(memory: &MemoryBlock, process: &mut Process) -> Result<(), std::io::Error> {
    let wrong = |what: String| Err(std::io::Error::other(what));
    // syscall; a loop without end; another page: ud2.
    memory.write(0, b"\x0f\x05\xeb\xfe");
    memory.write(4096, b"\x0f\x0b");
    process.apply(&[MapOp::Map { at: 0x40_0000, len: 8192, block: 0, offset: 0, prot: Prot::ReadExecute }])?;
    let mut state = [0; 4096];
    process.get_xstate(&mut state)?;
    process.set_xstate(&state)?;
    let mut regs = process::user_regs();
    regs.rip = 0x40_0000;
    let stop = process.run(&mut regs)?;
    if stop != Stop::Syscall {
        return wrong(format!("{stop:?}"));
    }
    let interrupter = process.interrupter();
    let other = std::thread::Builder::new().spawn(move || interrupter.interrupt())?;
    let stop = process.run(&mut regs)?;
    if stop != Stop::Interrupted || other.join().is_err() {
        return wrong(format!("{stop:?}"));
    }
    regs.rip = 0x40_1000;
    let stop = process.run(&mut regs)?;
    match stop {
        Stop::Fault { address: 0x40_1000, .. } => process.apply(&[MapOp::UnmapAll]),
        _ => wrong(format!("{stop:?}")),
    }
}
