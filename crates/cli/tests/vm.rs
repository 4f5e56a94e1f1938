//! `viridian vm` as a user and as fate treat it: the life of a VM, workers and commands that are killed, bad input, full
//! disks, a thousand VMs. The guests are a few instructions long; real ones are in the guest tests.

mod common;
mod house;

use common::{image, print};
use house::{House, counter, signal};
use rustix::process::Signal;
use serde_json::Value;
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Prints "up", and sleeps for ever.
fn sleeper(dir: &Path) -> PathBuf {
    image(dir, "sleeper", |a| {
        print(a, "up\n")?;
        let mut top = a.create_label();
        a.set_label(&mut top)?;
        a.cli()?;
        a.hlt()?;
        a.jmp(top)
    })
}

#[test]
fn a_life() {
    let house = House::new();
    let guest = counter(house.dir.path());
    house.make("one", &guest);
    assert_eq!(house.state("one"), "off");
    house.bad(&["vm", "pause", "one"], 4, "start it first");
    house.good(&["vm", "start", "one"]);
    house.bad(&["vm", "start", "one"], 4, "started already");
    assert_eq!(house.state("one"), "running");
    house.talk("one", "x", "up\nA");
    house.talk("one", "yz", "ABC");

    house.good(&["vm", "pause", "one"]);
    assert_eq!(house.state("one"), "paused");
    house.bad(&["vm", "pause", "one"], 4, "paused already");
    house.bad(&["vm", "stop", "one"], 4, "shutdown service");
    house.good(&["vm", "resume", "one"]);
    house.bad(&["vm", "resume", "one"], 4, "not paused");
    house.bad(&["vm", "set", "one", "--memory", "32M"], 4, "stop it first");
    house.bad(&["vm", "remove", "one"], 4, "stop it first");
    house.good(&["vm", "set", "one", "--notes", "can be set at any time"]);

    // The worker may not open these: they are handed over.
    let disk = house.path("disk.vhdx");
    let child = house.path("child.vhdx");
    house.good(&["vhd", "new", disk.to_str().unwrap(), "8M"]);
    house.good(&["vhd", "new", child.to_str().unwrap(), "--parent", disk.to_str().unwrap()]);
    assert_eq!(house.good(&["vm", "disk", "add", "one", child.to_str().unwrap()]), "0:0\n");
    house.bad(&["vm", "disk", "add", "one", child.to_str().unwrap(), "--lun", "1"], 4, "in use");
    house.bad(&["vm", "disk", "add", "one", disk.to_str().unwrap(), "--lun", "0"], 2, "taken");
    std::fs::write(house.path("disc.iso"), vec![0; 1 << 20]).unwrap();
    let disc = house.path("disc.iso");
    assert_eq!(house.good(&["vm", "disk", "add", "one", "--dvd"]), "0:1\n");
    house.good(&["vm", "dvd", "insert", "one", disc.to_str().unwrap()]);
    house.bad(&["vm", "dvd", "insert", "one", disc.to_str().unwrap()], 4, "");
    assert_eq!(house.json(&["vm", "show", "one", "--json"])["dvd"][0]["image"], disc.to_str().unwrap());

    house.good(&["vm", "stop", "one", "--save"]);
    assert_eq!(house.state("one"), "saved");
    house.bad(&["vm", "set", "one", "--processors", "2"], 4, "state is saved");
    house.bad(&["vm", "dvd", "eject", "one"], 4, "saved");
    house.good(&["vm", "start", "one"]);
    // It has forgotten nothing.
    house.talk("one", "x", "D");
    house.good(&["vm", "dvd", "eject", "one"]);
    house.good(&["vm", "disk", "remove", "one", "--lun", "0"]);
    house.bad(&["vm", "disk", "remove", "one", "--lun", "0"], 2, "no unit 0");

    house.good(&["vm", "restart", "one", "--reset"]);
    house.talk("one", "x", "up\nA");
    house.good(&["vm", "rename", "one", "two words"]);
    house.bad(&["vm", "show", "one"], 3, "no VM 'one'");
    house.good(&["vm", "stop", "two words", "--turn-off"]);
    house.bad(&["vm", "stop", "two words"], 4, "nothing to stop");
    house.good(&["vm", "start", "two words"]);
    // The guest switches itself off, and who is connected hears of it.
    let mut console = house.command(&["vm", "connect", "two words"]);
    let mut console = console.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    console.stdin.as_mut().unwrap().write_all(b"q").unwrap();
    let output = console.wait_with_output().unwrap();
    assert!(String::from_utf8_lossy(&output.stdout).ends_with('!'));
    assert!(String::from_utf8_lossy(&output.stderr).contains("switched itself off"), "{output:?}");
    assert_eq!(house.state("two words"), "off");

    let events = house.events("two words");
    let expected = [
        "created",
        "started",
        "paused",
        "resumed",
        "changed",
        "storage-changed",
        "storage-changed",
        "storage-changed",
        "saved",
        "restored",
        "storage-changed",
        "storage-changed",
        "reset",
        "renamed",
        "turned-off",
        "started",
        "stopped",
    ];
    assert_eq!(events, expected);
    let folder = house.folder("two words");
    house.good(&["vm", "remove", "two words"]);
    assert!(!folder.exists() && house.json(&["vm", "list", "--json"]).as_array().unwrap().is_empty());
    assert!(child.exists(), "images elsewhere stay");
}

#[test]
fn twenty_at_once() {
    let house = House::new();
    let guest = sleeper(house.dir.path());
    let names: Vec<String> = (0..20).map(|i| format!("vm {i}")).collect();
    names.iter().for_each(|name| house.make(name, &guest));
    // All commands at the same time.
    let all = |verb: &[&str]| {
        let children: Vec<_> = names
            .iter()
            .map(|name| {
                let mut arguments = vec!["vm", verb[0], name.as_str()];
                arguments.extend(&verb[1..]);
                house.command(&arguments).stderr(Stdio::piped()).spawn().unwrap()
            })
            .collect();
        for child in children {
            let output = child.wait_with_output().unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        }
    };
    let states = || -> Vec<String> {
        let list = house.json(&["vm", "list", "--json"]);
        list.as_array().unwrap().iter().map(|vm| vm["state"].as_str().unwrap().to_owned()).collect()
    };
    all(&["start"]);
    let begun = Instant::now();
    assert_eq!(states(), vec!["running"; 20]);
    println!("listing 20 running VMs took {:?}", begun.elapsed());
    names.iter().for_each(|name| house.talk(name, "", "up"));
    all(&["stop", "--turn-off"]);
    assert_eq!(states(), vec!["off"; 20]);
}

#[test]
fn a_worker_that_is_killed() {
    let house = House::new();
    let guest = counter(house.dir.path());
    house.make("one", &guest);
    house.good(&["vm", "start", "one"]);
    signal(house.worker("one"), Signal::KILL);
    let until = Instant::now() + Duration::from_secs(20);
    let said = loop {
        let said = house.say(&["vm", "list"]);
        if said.errors.contains("died") || Instant::now() > until {
            break said;
        }
    };
    assert!(said.status == 0 && said.errors.contains("'one'") && said.errors.contains("died"), "{}", said.errors);
    assert_eq!(house.say(&["vm", "list"]).errors, "", "it is said once, and then it is in the log");
    assert_eq!(house.events("one"), ["created", "started", "worker-died"]);
    house.good(&["vm", "start", "one"]);
    house.talk("one", "x", "A");

    // One that does not answer, and does not end when it is told.
    let pid = house.worker("one");
    signal(pid, Signal::STOP);
    let begun = Instant::now();
    let said = house.say(&["vm", "list"]);
    assert!(said.errors.contains("does not answer"), "{}", said.errors);
    assert!(begun.elapsed() < Duration::from_secs(10), "a worker that hangs holds the list up");
    house.bad(&["vm", "pause", "one"], 5, "does not answer");
    house.good(&["vm", "stop", "one", "--turn-off"]);
    assert_eq!((house.state("one").as_str(), house.events("one").last().unwrap().as_str()), ("off", "killed"));
    house.good(&["vm", "start", "one"]);
}

#[test]
fn after_a_restart_of_the_host() {
    let house = House::new();
    house.make("one", &sleeper(house.dir.path()));
    let folder = house.folder("one");
    // What a worker leaves behind that ran when the host went down; its process id is somebody else's now.
    let record = serde_json::json!({
        "pid": std::process::id(), "start_ticks": 1, "boot_id": "11111111-2222-3333-4444-555555555555",
        "since": "2026-01-01T00:00:00.000Z", "cgroup": null, "unlimited": []
    });
    std::fs::write(folder.join("state/worker.json"), record.to_string()).unwrap();
    drop(std::os::unix::net::UnixListener::bind(folder.join("state/control.sock")).unwrap());
    let said = house.say(&["vm", "list"]);
    assert!(said.errors.contains("the host was restarted") && said.out.contains("Off"), "{}{}", said.out, said.errors);
    house.good(&["vm", "start", "one"]);
    house.talk("one", "", "up");
    assert_eq!(house.events("one"), ["created", "host-restarted", "started"]);
}

#[test]
fn commands_that_are_killed() {
    let house = House::new();
    let guest = sleeper(house.dir.path());
    let guest = guest.to_str().unwrap();
    let disk = house.path("disk.vhdx");
    house.good(&["vhd", "new", disk.to_str().unwrap(), "8M"]);
    for name in ["a", "b"] {
        house.make(name, Path::new(guest));
    }
    let seed: u64 = std::env::var("VIRIDIAN_SEED").map_or(1, |s| s.parse().expect("VIRIDIAN_SEED is a number"));
    println!("seed {seed} (VIRIDIAN_SEED)");
    let mut random = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = |below: u64| {
        // xorshift64
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random % below
    };
    let commands: &[&[&str]] = &[
        &["vm", "new", "c", "--kernel", guest, "--memory", "16M", "--engine", "soft", "--new-disk", "8M"],
        &["vm", "set", "a", "--memory", "32M"],
        &["vm", "set", "a", "--memory", "16M", "--notes", "x"],
        &["vm", "rename", "b", "d"],
        &["vm", "rename", "d", "b"],
        &["vm", "disk", "add", "b", disk.to_str().unwrap()],
        &["vm", "disk", "remove", "b", "--lun", "0"],
        &["vm", "remove", "c", "--disks"],
        &["vm", "start", "a"],
        &["vm", "start", "c"],
        &["vm", "stop", "a", "--save"],
        &["vm", "stop", "a", "--turn-off"],
        &["vm", "stop", "c", "--turn-off"],
    ];
    for round in 0..120 {
        let arguments = commands[next(commands.len() as u64) as usize];
        let mut child = house.command(arguments).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        std::thread::sleep(Duration::from_micros(next(40_000)));
        let _ = child.kill();
        child.wait().unwrap();
        // A worker, too, now and then.
        if round % 10 == 9 && house.state("a") == "running" {
            let pid = house.json(&["vm", "show", "a", "--json"])["worker"]["pid"].as_i64().unwrap_or(0);
            if pid > 1 {
                signal(pid as i32, Signal::KILL);
            }
        }
        let said = house.say(&["vm", "list", "--json"]);
        assert_eq!(said.status, 0, "round {round}, after {arguments:?}: {}", said.errors);
        let list: Value = serde_json::from_str(&said.out).unwrap();
        let mut names: Vec<&str> = list.as_array().unwrap().iter().map(|vm| vm["name"].as_str().unwrap()).collect();
        let count = names.len();
        names.dedup();
        assert!((2..=3).contains(&count) && names.len() == count, "round {round}, after {arguments:?}: {names:?}");
    }
    // Everything can still be used.
    let until = Instant::now() + Duration::from_secs(60);
    for name in ["a", "b", "c", "d"] {
        while house.say(&["vm", "show", name]).status == 0 && house.state(name) != "off" {
            house.say(&["vm", "stop", name, "--turn-off"]);
            assert!(Instant::now() < until, "{name} is {}", house.state(name));
        }
        let _ = house.say(&["vm", "disk", "remove", name, "--lun", "0"]);
    }
    house.good(&["vm", "start", "a"]);
    house.talk("a", "", "up");
    house.good(&["vm", "new", "last"]);
    let left: Vec<_> = std::fs::read_dir(house.store().join("vms"))
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.starts_with('.'))
        .collect();
    assert!(left.is_empty(), "half-made VMs are cleared away: {left:?}");
}

#[test]
fn two_commands_at_once() {
    let house = House::new();
    let guest = sleeper(house.dir.path());
    let race = |arguments: &[&str]| -> Vec<i32> {
        let children: Vec<_> = (0..4)
            .map(|_| house.command(arguments).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap())
            .collect();
        let mut statuses: Vec<i32> =
            children.into_iter().map(|mut child| child.wait().unwrap().code().unwrap()).collect();
        statuses.sort_unstable();
        statuses
    };
    let guest = guest.to_str().unwrap();
    assert_eq!(race(&["vm", "new", "x", "--kernel", guest, "--memory", "16M", "--engine", "soft"]), [0, 2, 2, 2]);
    assert_eq!(race(&["vm", "start", "x"]), [0, 4, 4, 4]);
    assert_eq!(race(&["vm", "set", "x", "--notes", "n"]), [0, 0, 0, 0]);
    // Whoever is late finds it off, or gone while it asked.
    let statuses = race(&["vm", "stop", "x", "--turn-off"]);
    assert!(statuses[0] == 0 && statuses.iter().all(|s| [0, 1, 4].contains(s)), "{statuses:?}");
    let statuses = race(&["vm", "remove", "x"]);
    assert!(statuses[0] == 0 && statuses[1..].iter().all(|s| [1, 3].contains(s)), "{statuses:?}");
}

#[test]
fn bad_input() {
    let house = House::new();
    let guest = sleeper(house.dir.path());
    house.make("one", &guest);
    for (name, text) in [
        ("a/b", "slash"),
        ("a\nb", "control character"),
        ("\u{1b}[31mred", "control character"),
        ("", "empty"),
        (" a", "space"),
        ("one", "already"),
    ] {
        house.bad(&["vm", "new", name], 2, text);
        if name != "one" {
            house.bad(&["vm", "rename", "one", name], 2, text);
        }
    }
    let long = "x".repeat(10_000);
    house.bad(&["vm", "new", &long], 2, "10000 characters");
    for verb in ["show", "start", "stop", "pause", "connect", "remove", "events"] {
        house.bad(&["vm", verb, &long], 3, "there is no VM");
        house.bad(&["vm", verb, "nobody"], 3, "vm list");
    }
    house.bad(&["vm", "show", "ONE"], 3, "there is 'one'");
    house.bad(&["guest", "nobody", "status"], 3, "there is no VM");
    house.bad(&["guest", "one", "status"], 4, "start it first");
    house.bad(&["guest", "/nowhere/socket", "status"], 1, "no machine answers");
    for size in ["-1", "0", "1.5G", "9999T", "", "1X", "99999999999999999999G", "M"] {
        house.bad(&["vm", "new", "x", "--memory", size], 2, "--memory");
        house.bad(&["vm", "set", "one", "--memory", size], 2, "--memory");
        house.bad(&["vm", "memory", "set", "one", "--memory", size], 2, "--memory");
    }
    for size in ["-1", "1.5G", "1X", "0", "9999T"] {
        let said = house.say(&["vm", "new", "x", "--new-disk", size]);
        assert!(said.status == 2 && said.errors.starts_with("error: "), "{size}: {} {}", said.status, said.errors);
    }
    for (option, value) in [
        ("--processors", "0"),
        ("--processors", "65"),
        ("--processors", "-1"),
        ("--cpu-cap", "101"),
        ("--cpu-weight", "0"),
    ] {
        house.bad(&["vm", "set", "one", option, value], 2, option);
    }
    house.bad(&["vm", "set", "one", "--cpu-model", "486"], 2, "x86-64-v2");
    house.bad(&["vm", "set", "one", "--affinity", "fast"], 2, "one-core-per-vp");
    house.bad(&["vm", "set", "one"], 2, "nothing to set");
    house.bad(&["vm", "new", "x", "--generation", "1"], 2, "not built yet");
    house.bad(&["vm", "new", "x", "--secure-boot-template", "mine"], 2, "mine");

    // Images: missing, foreign, truncated, in use.
    let write = |name: &str, bytes: &[u8]| {
        std::fs::write(house.path(name), bytes).unwrap();
        house.path(name).to_str().unwrap().to_owned()
    };
    let good = house.path("good.vhdx").to_str().unwrap().to_owned();
    house.good(&["vhd", "new", &good, "8M"]);
    let whole = std::fs::read(&good).unwrap();
    let missing = house.path("missing.vhdx").to_str().unwrap().to_owned();
    for (image, text) in [
        (missing, "missing.vhdx"),
        (write("foreign.vhdx", b"#!/bin/sh\n"), "foreign.vhdx"),
        (write("short.vhdx", &whole[..100_000]), "short.vhdx"),
        (write("strange.xyz", b"?"), "strange.xyz"),
        (house.dir.path().to_str().unwrap().to_owned(), ""),
    ] {
        let said = house.say(&["vm", "new", "x", "--disk", &image]);
        assert!(said.status != 0 && said.errors.contains(text), "{image}: {}", said.errors);
        let said = house.say(&["vm", "disk", "add", "one", &image]);
        assert!(said.status != 0 && said.errors.contains(text), "{image}: {}", said.errors);
    }
    house.bad(&["vm", "new", "x", "--kernel", "/nowhere"], 2, "/nowhere");
    assert_eq!(house.json(&["vm", "list", "--json"]).as_array().unwrap().len(), 1, "nothing is left of what failed");
    house.good(&["vm", "disk", "add", "one", &good]);
    house.good(&["vm", "start", "one"]);
    house.make("two", &guest);
    house.good(&["vm", "disk", "add", "two", &good]);
    house.bad(&["vm", "start", "two"], 1, "in use");
    assert_eq!(house.events("two").last().unwrap(), "start-failed");
    assert_eq!(house.state("two"), "off");
    // An image that goes away between two starts.
    house.good(&["vm", "stop", "one", "--turn-off"]);
    std::fs::remove_file(&good).unwrap();
    house.bad(&["vm", "start", "one"], 2, "good.vhdx");
    // A saved state that is damaged.
    house.good(&["vm", "disk", "remove", "one", "--lun", "0"]);
    house.good(&["vm", "start", "one"]);
    house.good(&["vm", "stop", "one", "--save"]);
    let state = house.folder("one").join("state/saved.state");
    let bytes = std::fs::read(&state).unwrap();
    std::fs::write(&state, &bytes[..bytes.len() / 2]).unwrap();
    house.bad(&["vm", "start", "one"], 1, "damaged");
    assert_eq!(house.state("one"), "saved", "nothing is lost");
    std::fs::write(&state, bytes).unwrap();
    house.good(&["vm", "start", "one"]);
}

#[test]
fn a_damaged_configuration_is_named() {
    let house = House::new();
    let guest = sleeper(house.dir.path());
    for name in ["bad", "fine"] {
        house.make(name, &guest);
    }
    let path = house.folder("bad").join("config.toml");
    let text = std::fs::read_to_string(&path).unwrap();
    let edited = text.replace("size = \"16M\"", "size = \"much\"");
    let line = 1 + edited.lines().position(|l| l.contains("much")).unwrap();
    std::fs::write(&path, &edited).unwrap();
    let said = house.say(&["vm", "list"]);
    assert_eq!(said.status, 2);
    assert!(said.out.contains("fine"), "the others are listed: {}", said.out);
    assert!(said.errors.contains(&format!("config.toml:{line}: ")) && said.errors.contains("much"), "{}", said.errors);
    let id = path.parent().unwrap().file_name().unwrap().to_str().unwrap();
    house.bad(&["vm", "show", id], 2, &format!("config.toml:{line}: "));
    house.bad(&["vm", "start", "bad"], 3, "damaged");
    // A person mends it.
    std::fs::write(&path, text.replace("16M", "24M")).unwrap();
    assert_eq!(house.json(&["vm", "show", "bad", "--json"])["memory_bytes"], 24 << 20);
    // An index that somebody has spoilt is no matter.
    std::fs::write(house.store().join("index.json"), "{").unwrap();
    assert_eq!(house.json(&["vm", "list", "--json"]).as_array().unwrap().len(), 2);
}

/// Runs a script as root of a user namespace; `None` where this host gives none.
fn in_namespace(house: &House, script: &str) -> Option<String> {
    let probe = Command::new("unshare").args(["-rm", "true"]).stderr(Stdio::null()).status();
    if !probe.is_ok_and(|s| s.success()) {
        println!("left out: this host gives no user namespaces");
        return None;
    }
    let output = Command::new("unshare")
        .args(["-rm", "sh", "-ec", script])
        .env("V", env!("CARGO_BIN_EXE_viridian"))
        .env("D", house.dir.path())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    Some(text)
}

#[test]
fn full_disk_and_read_only_store() {
    let house = House::new();
    let script = r#"
        mkdir $D/small; mount -t tmpfs -o size=256k none $D/small
        export VIRIDIAN_STORE=$D/small/store
        $V vm new first >/dev/null
        dd if=/dev/zero of=$D/small/ballast bs=1k 2>/dev/null || true
        echo "full new: $($V vm new second 2>&1) $?"
        echo "full set: $($V vm set first --memory 2G 2>&1) $?"
        echo "list: $($V vm list --json | grep -c '"name"') $($V vm show first --json | grep memory_bytes)"
        rm $D/small/ballast
        $V vm set first --memory 2G
        echo "after: $($V vm show first --json | grep memory_bytes)"
        # The mount, not the file system: as options of that the command would give users that the namespace does not know.
        mount -o remount,bind,ro $D/small
        echo "ro new: $($V vm new third 2>&1) $?"
        echo "ro set: $($V vm set first --memory 3G 2>&1) $?"
        echo "ro start: $($V vm start first 2>&1) $?"
        echo "ro list: $($V vm list --json | grep -c '"name"')"
    "#;
    // `set -e` must not end the script for what is meant to fail.
    let Some(text) = in_namespace(&house, &script.replace("2>&1) $?", "2>&1 && echo =0 || echo =$?)")) else { return };
    let line = |start: &str| text.lines().find(|l| l.starts_with(start)).unwrap_or_else(|| panic!("{start}: {text}"));
    for start in ["full new", "full set"] {
        let said = line(start);
        assert!(
            said.contains("error: ") && said.contains("No space left") && said.contains("free some space"),
            "{said}"
        );
    }
    assert!(line("list").contains("list: 1 ") && line("list").contains("1073741824"), "nothing was lost: {text}");
    assert!(line("after").contains("2147483648"), "{text}");
    for start in ["ro new", "ro set", "ro start"] {
        let said = line(start);
        assert!(said.contains("error: ") && said.contains("read-only"), "{said}");
    }
    assert_eq!(line("ro list"), "ro list: 1");
    assert_eq!(text.matches("=1").count(), 5, "{text}");
}

#[test]
fn a_thousand_vms() {
    let house = House::new();
    house.good(&["vm", "new", "model"]);
    let text = std::fs::read_to_string(house.folder("model").join("config.toml")).unwrap();
    let id = house.json(&["vm", "show", "model", "--json"])["id"].as_str().unwrap().to_owned();
    for i in 0..999u32 {
        let new = format!("00000000-0000-4000-8000-{i:012x}");
        let folder = house.store().join("vms").join(&new);
        std::fs::create_dir_all(folder.join("state")).unwrap();
        let text = text.replace(&id, &new).replace("\"model\"", &format!("\"number {i}\""));
        std::fs::write(folder.join("config.toml"), text).unwrap();
    }
    std::thread::sleep(Duration::from_millis(200));
    let time = |arguments: &[&str]| {
        let begun = Instant::now();
        house.good(arguments);
        begun.elapsed()
    };
    let first = time(&["vm", "list"]);
    let mut lists: Vec<Duration> = (0..5).map(|_| time(&["vm", "list"])).collect();
    lists.sort_unstable();
    let mut news: Vec<Duration> = (0..5).map(|i| time(&["vm", "new", &format!("new {i}")])).collect();
    news.sort_unstable();
    println!("1,000 VMs: first list {first:?}, then {:?}; new {:?} (medians of 5)", lists[2], news[2]);
    assert_eq!(house.json(&["vm", "list", "--json"]).as_array().unwrap().len(), 1005);
    // Generous, and the best of five: the machine may be busy, and the program not optimised. The goals are 100 ms and 50 ms.
    assert!(lists[0] < Duration::from_millis(500) && news[0] < Duration::from_millis(500));
}

#[test]
fn the_worker_is_confined_and_outlives_its_starter() {
    let house = House::new();
    house.make("one", &sleeper(house.dir.path()));
    house.good(&["vm", "start", "one"]);
    house.talk("one", "", "up");
    let pid = house.worker("one");
    let machine = &house.json(&["vm", "show", "one", "--json"])["machine"];
    let applied: Vec<&str> =
        machine["sandbox"]["applied"].as_array().unwrap().iter().filter_map(Value::as_str).collect();
    println!("applied {applied:?}, missing {}", machine["sandbox"]["missing"]);
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let field = |text: &str, name: &str| {
        let line = text.lines().find_map(|l| l.strip_prefix(name));
        line.map(|l| l.trim_start_matches(':').trim().to_owned()).unwrap_or_default()
    };
    assert_eq!(field(&status, "NoNewPrivs"), "1");
    assert_eq!(field(&status, "Seccomp"), "2");
    assert_eq!(field(&status, "CapEff"), "0000000000000000");
    let link = |pid: i32, name: &str| std::fs::read_link(format!("/proc/{pid}/ns/{name}")).unwrap();
    if applied.contains(&"user-namespace") {
        let me = std::process::id() as i32;
        assert!(["user", "net", "ipc"].iter().all(|ns| link(pid, ns) != link(me, ns)));
    }
    // A VP's thread has one filter more than the others.
    let mut filters = std::collections::BTreeMap::new();
    for task in std::fs::read_dir(format!("/proc/{pid}/task")).unwrap() {
        let status = std::fs::read_to_string(task.unwrap().path().join("status")).unwrap();
        assert_eq!(field(&status, "Seccomp"), "2", "{status}");
        filters.insert(field(&status, "Name"), field(&status, "Seccomp_filters"));
    }
    assert!(filters["vp0"] > filters["control"], "{filters:?}");
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let session = stat.rsplit_once(')').unwrap().1.split_whitespace().nth(3).unwrap().to_owned();
    assert_eq!(session, pid.to_string(), "a session of its own");
    let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(house.folder("one")).unwrap().permissions());
    assert_eq!(mode & 0o77, 0, "nobody else can read the VM's folder");
}

#[test]
fn limits_and_affinity() {
    let house = House::new();
    house.make("one", &sleeper(house.dir.path()));
    house.good(&["vm", "processor", "set", "one", "--affinity", "one-core-per-vp", "--cpu-cap", "50"]);
    house.good(&["vm", "memory", "set", "one", "--reserve-memory", "on"]);
    house.good(&["vm", "start", "one"]);
    house.talk("one", "", "up");
    let pid = house.worker("one");
    let mut found = false;
    for task in std::fs::read_dir(format!("/proc/{pid}/task")).unwrap() {
        let status = std::fs::read_to_string(task.unwrap().path().join("status")).unwrap();
        if status.starts_with("Name:\tvp0\n") {
            let list = status.lines().find_map(|l| l.strip_prefix("Cpus_allowed_list:")).unwrap().trim().to_owned();
            assert!(list.parse::<u32>().is_ok(), "VP 0 runs on one processor, not on {list}");
            found = true;
        }
    }
    assert!(found, "there is a thread for VP 0");
    let resident = std::fs::read_to_string(format!("/proc/{pid}/statm")).unwrap();
    let pages: u64 = resident.split(' ').nth(1).unwrap().parse().unwrap();
    assert!(pages * 4096 >= 16 << 20, "all memory is there: {pages} pages");
    // The cap is in force, or it is said that it is not.
    let shown = house.json(&["vm", "show", "one", "--json"]);
    let group = shown["worker"]["cgroup"].as_str();
    let missing = shown["worker"]["unlimited"].as_array().unwrap();
    match group {
        Some(group) => {
            assert_eq!(std::fs::read_to_string(Path::new(group).join("cpu.max")).unwrap().trim(), "50000 100000");
        }
        None => {
            assert!(missing[0].as_str().unwrap().contains("cap"), "{missing:?}");
            assert!(house.events("one").contains(&"limits-missing".to_owned()));
        }
    }
    house.good(&["vm", "stop", "one", "--turn-off"]);
    house.good(&["vm", "processor", "set", "one", "--affinity", "1023"]);
    house.bad(&["vm", "start", "one"], 1, "1023");
}

#[test]
fn a_guest_that_crashes() {
    let house = House::new();
    let guest = image(house.dir.path(), "crash", |a| {
        print(a, "up\n")?;
        a.ud2()
    });
    house.make("one", &guest);
    house.good(&["vm", "start", "one"]);
    let until = Instant::now() + Duration::from_secs(30);
    while house.state("one") != "off" {
        assert!(Instant::now() < until, "it is {}", house.state("one"));
    }
    let events = house.json(&["vm", "events", "one", "--json"]);
    let last = events.as_array().unwrap().last().unwrap();
    assert_eq!(last["event"], "guest-crashed");
    let message = last["message"].as_str().unwrap();
    assert!(message.contains("triple fault") && message.contains("rip"), "{message}");
}

#[test]
fn machines_of_no_inventory_answer_the_same_commands() {
    let house = House::new();
    let guest = sleeper(house.dir.path());
    let mut child = Command::new(env!("CARGO_BIN_EXE_viridian"));
    child
        .args(["run", "--name", "loose", "--memory", "16M", "--engine", "soft", "--hyperv", "on", "--kernel"])
        .arg(&guest);
    child.env("XDG_RUNTIME_DIR", house.dir.path()).stdin(Stdio::null()).stdout(Stdio::piped()).process_group(0);
    let mut child = child.spawn().unwrap();
    let ask = |arguments: &[&str]| {
        let output = house.command(arguments).env("XDG_RUNTIME_DIR", house.dir.path()).output().unwrap();
        (output.status.code(), String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned())
    };
    let until = Instant::now() + Duration::from_secs(30);
    loop {
        let (status, text) = ask(&["guest", "loose", "status"]);
        if status == Some(0) {
            assert!(text.contains("no contact"), "{text}");
            break;
        }
        assert!(Instant::now() < until, "{text}");
        std::thread::sleep(Duration::from_millis(20));
    }
    let disk = house.path("disk.vhdx").to_str().unwrap().to_owned();
    house.good(&["vhd", "new", &disk, "8M"]);
    assert_eq!(ask(&["vm", "disk", "add", "loose", &disk]), (Some(0), "0:0\n".into()));
    assert_eq!(ask(&["vm", "disk", "remove", "loose", "--lun", "0"]).0, Some(0));
    assert_eq!(ask(&["guest", "loose", "shutdown"]).0, Some(4), "its guest has no services");
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn completions_manual_pages_and_the_host() {
    let house = House::new();
    for shell in ["bash", "zsh", "fish"] {
        assert!(house.good(&["completions", shell]).contains("connect"), "{shell}");
    }
    let pages = house.path("man");
    house.good(&["man", pages.to_str().unwrap()]);
    assert!(
        pages.join("viridian-vm-start.1").is_file(),
        "{:?}",
        std::fs::read_dir(&pages).unwrap().collect::<Vec<_>>()
    );
    let host = house.json(&["host", "show", "--json"]);
    assert!(["soft", "kvm"].contains(&host["engine"].as_str().unwrap()));
    assert!(host["kvm"].as_str().unwrap().contains("used"));
    assert!(house.good(&["host", "show"]).contains("Processor models"));
}
