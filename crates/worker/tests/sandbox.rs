//! A worker under attack: each trial is a process of its own that confines itself as a worker does and then tries what it
//! must not be able to do. The trials that must work show that the others fail for the sandbox's reasons.
//!
//! What this host cannot apply (an old kernel without Landlock, a container without user namespaces) is said, and its
//! trials are left out.

use std::fs::File;
use std::io::{ErrorKind, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Command, ExitCode};
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
    ("exec", "seccomp", Expect::Killed),
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

fn confined(dir: &Path) -> Sandbox {
    let files = sandbox::Files {
        read: vec![dir.join("read-only")],
        write: vec![dir.join("own")],
        replace: vec![dir.join("replaced")],
        sockets: vec![dir.join("sockets")],
    };
    let mut report = sandbox::confine(&files);
    sandbox::filter(&mut report);
    report
}

fn attack(trial: &str, dir: &Path) -> ExitCode {
    let listener = UnixListener::bind(dir.join("own").join(format!("{trial}.sock")));
    let _client = UnixStream::connect(dir.join("own").join(format!("{trial}.sock")));
    let parent = rustix::process::getppid();
    let outside_user = std::fs::metadata("/proc/self").map(|m| std::os::unix::fs::MetadataExt::uid(&m));
    let report = confined(dir);
    let denied = || std::io::Error::from(ErrorKind::PermissionDenied);
    match trial {
        "report" => {
            report.missing.iter().for_each(|line| println!("{line}"));
            ExitCode::SUCCESS
        }
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
            if let Err(error) = sandbox::filter_vp() {
                println!("{error}");
                return ExitCode::from(STRANGE);
            }
            verdict(listener.and_then(|l| l.accept()))
        }
        "vp-works" | "vp-opens-own" | "vp-removes-own" | "vp-asks-for-a-file" => {
            let mut open = File::options().append(true).open(dir.join("own/file"));
            if let Err(error) = sandbox::filter_vp() {
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
