//! The life of a VM of the inventory, with the command line: created, started, connected, paused, resumed, given a disk,
//! saved, started again, restarted, stopped, renamed, removed. The guest's clock, its processes and its open files are the
//! witnesses. And what an idle one costs the host.

use super::hosted::Stage;
use crate::initramfs::disks::must;
use crate::session::{Event, Session, resident_beside};
use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use std::io::Write as _;
use std::path::PathBuf;
use std::process::{ChildStdin, Command};
use std::time::{Duration, Instant};

const NAME: &str = "a life";
/// Most memory of its own beyond the guest's RAM that a worker holds while its guest idles, in MiB. With the program's text,
/// which is larger when it is not optimised, it is to be 25.
const MOST_OVERHEAD: u64 = 18;
/// Most of a core that it uses then, in percent.
const MOST_IDLE_LOAD: f64 = 1.0;

/// The VM and its console.
struct Life<'a> {
    stage: &'a Stage<'a>,
    store: PathBuf,
    name: String,
    questions: u32,
}

struct Console {
    session: Session,
    keyboard: ChildStdin,
}

/// Runs it.
///
/// # Errors
/// Says what was not so.
pub fn life(stage: &Stage) -> Result<()> {
    let store = stage.file("store");
    let _ = std::fs::remove_dir_all(&store);
    let mut life = Life { stage, store: store.clone(), name: NAME.into(), questions: 0 };
    let result = life.run();
    if result.is_err() {
        let _ = life.vm(&["stop", &life.name, "--turn-off"]);
    } else {
        let _ = std::fs::remove_dir_all(&store);
        let _ = std::fs::remove_file(stage.file("hot.vhdx"));
    }
    result
}

impl Life<'_> {
    fn command(&self, arguments: &[&str]) -> Result<Command> {
        let mut command = self.stage.viridian(arguments)?;
        command.arg("--store").arg(&self.store);
        Ok(command)
    }

    /// `viridian vm` with these arguments.
    fn vm(&self, arguments: &[&str]) -> Result<String> {
        must(&mut self.command(&[&["vm"], arguments].concat())?)
    }

    fn shown(&self) -> Result<Value> {
        Ok(serde_json::from_str(&self.vm(&["show", &self.name, "--json"])?)?)
    }

    fn expect_state(&self, state: &str) -> Result<()> {
        let shown = self.shown()?;
        ensure!(shown["state"] == state, "the VM is {}, expected {state}", shown["state"]);
        Ok(())
    }

    fn connect(&self) -> Result<Console> {
        let command = self.command(&["vm", "connect", &self.name])?;
        let mut session = Session::start(command, Some(self.stage.log), true)?;
        let keyboard = session.input().context("the console takes input")?;
        Ok(Console { session, keyboard })
    }

    /// Runs a line in the guest's shell and gives what it prints.
    fn ask(&mut self, console: &mut Console, line: &str) -> Result<String> {
        self.questions += 1;
        let number = self.questions;
        // The shell echoes the line: its marks are not yet what they are in the answer.
        let text = format!("echo begin-$(({number} + 1000)); {line}; echo end-$(({number} + 1000))\n");
        console.keyboard.write_all(text.as_bytes()).context("the console is gone")?;
        let (begin, end) = (format!("begin-{}", number + 1000), format!("end-{}", number + 1000));
        let event = console.session.wait_for(Duration::from_secs(60), |t| t.contains(&end))?;
        ensure!(event == Event::Seen, "no answer to '{line}': {event:?}; see {}", self.stage.log.display());
        let all = console.session.text();
        let answer =
            all.split_once(&begin).and_then(|(_, rest)| rest.split_once(&end)).context("the marks are there")?;
        Ok(answer.0.trim().replace('\r', ""))
    }

    fn uptime(&mut self, console: &mut Console) -> Result<f64> {
        let text = self.ask(console, "cut -d' ' -f1 /proc/uptime")?;
        text.parse().with_context(|| format!("'{text}' is no uptime"))
    }

    fn prompt(&self, console: &mut Console) -> Result<()> {
        let event = console.session.wait_for(self.stage.limit, |t| t.contains("viridian:/#") || super::is_fatal(t))?;
        super::expect_seen(event, self.stage.limit, console.session.text(), "the shell's prompt")
    }

    fn run(&mut self) -> Result<()> {
        let (memory, processors) = (self.stage.vm.memory_mib, self.stage.vm.processors);
        let kernel = self.stage.vm.kernel.display().to_string();
        let initrd = self.stage.vm.initrd.display().to_string();
        self.vm(&[
            "new",
            NAME,
            "--kernel",
            &kernel,
            "--initrd",
            &initrd,
            "--append",
            &self.stage.vm.command_line(),
            "--memory",
            &format!("{memory}M"),
            "--processors",
            &processors.to_string(),
            "--engine",
            self.stage.engine()?,
        ])?;
        self.expect_state("off")?;
        self.vm(&["start", NAME])?;
        let mut console = self.connect()?;
        self.prompt(&mut console)?;
        // Witnesses: an open file, and a process that counts.
        self.ask(&mut console, "exec 5> /tmp/open; echo one >&5")?;
        self.ask(&mut console, "{ while :; do n=$((n + 1)); echo $n > /tmp/count; sleep 0.1; done & }")?;
        self.pause(&mut console)?;
        self.hot_add(&mut console)?;
        let mut console = self.save_and_start(console)?;
        self.ask(&mut console, "kill $!")?;
        self.restart(&mut console)?;
        self.idle()?;

        self.vm(&["stop", NAME])?;
        self.expect_state("off")?;
        console.session.finish(Duration::from_secs(10))?.context("the console did not end with the machine")?;
        self.name = "afterlife".into();
        self.vm(&["rename", NAME, "afterlife"])?;
        ensure!(self.vm(&["list"])?.contains("afterlife"), "the new name is not in the list");
        let events: Value = serde_json::from_str(&self.vm(&["events", &self.name, "--json"])?)?;
        let events: Vec<&str> = events.as_array().into_iter().flatten().filter_map(|e| e["event"].as_str()).collect();
        let expected = [
            "created",
            "started",
            "paused",
            "resumed",
            "storage-changed",
            "saved",
            "restored",
            "shutdown-requested",
            "reset",
            "shutdown-requested",
            "stopped",
            "renamed",
        ];
        ensure!(events == expected, "the event log says {events:?}");
        self.vm(&["remove", &self.name])?;
        ensure!(self.vm(&["list", "--json"])?.trim() == "[]", "the VM is still listed");
        Ok(())
    }

    /// While it is paused, no time passes for the guest.
    fn pause(&mut self, console: &mut Console) -> Result<()> {
        let before = self.uptime(console)?;
        let (begun, pause) = (Instant::now(), Duration::from_secs(4));
        self.vm(&["pause", NAME])?;
        self.expect_state("paused")?;
        std::thread::sleep(pause);
        self.vm(&["resume", NAME])?;
        self.expect_state("running")?;
        let (passed, outside) = (self.uptime(console)? - before, begun.elapsed().as_secs_f64());
        ensure!(
            passed >= 0.0 && passed < outside - pause.as_secs_f64() + 1.0,
            "{outside:.1} s passed, {} of them paused, and the guest's uptime grew by {passed:.1} s",
            pause.as_secs()
        );
        Ok(())
    }

    fn hot_add(&mut self, console: &mut Console) -> Result<()> {
        let disk = self.stage.file("hot.vhdx");
        self.stage.new_disk(&disk, "64M", "2M")?;
        self.vm(&["disk", "add", NAME, &disk.display().to_string()])?;
        let wait = "for i in $(seq 100); do [ -b /dev/sda ] && break; sleep 0.1; done";
        self.ask(console, wait)?;
        let text = self.ask(console, "echo written > /dev/sda; sync; cat /sys/block/sda/size")?;
        ensure!(text == "131072", "the hot-added disk has {text} sectors");
        Ok(())
    }

    /// Its state goes to a file, and another process goes on with it.
    fn save_and_start(&mut self, mut console: Console) -> Result<Console> {
        let uptime = self.uptime(&mut console)?;
        let count: u32 = self.ask(&mut console, "cat /tmp/count")?.parse()?;
        self.vm(&["stop", NAME, "--save"])?;
        self.expect_state("saved")?;
        console.session.finish(Duration::from_secs(10))?.context("the console did not end with the machine")?;
        std::thread::sleep(Duration::from_secs(2));
        self.vm(&["start", NAME])?;
        let mut console = self.connect()?;
        let after = self.uptime(&mut console)?;
        ensure!(after >= uptime && after < uptime + 60.0, "the uptime was {uptime} and is {after} after restoring");
        let text = self.ask(&mut console, "echo two >&5; cat /tmp/open")?;
        ensure!(text == "one\ntwo", "the open file holds {text:?}");
        let text = self.ask(&mut console, "echo 3 > /proc/sys/vm/drop_caches; head -n 1 /dev/sda")?;
        ensure!(text == "written", "the hot-added disk holds {text:?}");
        std::thread::sleep(Duration::from_millis(300));
        let later: u32 = self.ask(&mut console, "cat /tmp/count")?.parse()?;
        ensure!(later > count, "the process that counts stands at {later}, and stood at {count} before");
        Ok(console)
    }

    fn restart(&mut self, console: &mut Console) -> Result<()> {
        let prompts = |text: &str| text.matches("Type poweroff to end").count();
        let seen = prompts(console.session.text());
        self.vm(&["restart", NAME])?;
        let event = console.session.wait_for(self.stage.limit, |t| prompts(t) > seen || super::is_fatal(t))?;
        super::expect_seen(event, self.stage.limit, console.session.text(), "the second boot")?;
        let text = self.ask(console, "ls /tmp/open 2>&1; head -n 1 /dev/sda")?;
        ensure!(text.contains("No such file") && text.ends_with("written"), "after the restart: {text:?}");
        Ok(())
    }

    /// What the worker costs while its guest has nothing to do.
    fn idle(&self) -> Result<()> {
        let shown = self.shown()?;
        let pid = shown["worker"]["pid"].as_u64().context("the worker's process")?;
        // The guest comes to rest, and the engine lets go of what it does not use.
        let until = Instant::now() + Duration::from_secs(60);
        let ram = u64::from(self.stage.vm.memory_mib) << 20;
        loop {
            let before = processor_time(pid)?;
            std::thread::sleep(Duration::from_secs(10));
            let load = (processor_time(pid)? - before).as_secs_f64() * 10.0;
            let (own, shared) = resident_beside(pid, ram)?;
            let (own, shared) = (own >> 20, shared >> 20);
            let cost = format!(
                "{own} MiB of its own beyond its RAM, {shared} MiB of the program's file that all VMs share, and {load:.1} % \
                 of a core"
            );
            if own <= MOST_OVERHEAD && load <= MOST_IDLE_LOAD {
                println!("         an idle VM with {} VPs costs {cost}", self.stage.vm.processors);
                return Ok(());
            }
            if Instant::now() > until {
                bail!("the idle VM costs {cost}; {MOST_OVERHEAD} MiB and {MOST_IDLE_LOAD} % are allowed");
            }
        }
    }
}

fn processor_time(pid: u64) -> Result<Duration> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).context("the worker has ended")?;
    crate::session::cpu_time(&stat).context("unexpected format of /proc/PID/stat")
}
