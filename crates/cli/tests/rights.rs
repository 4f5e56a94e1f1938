//! Root and what only its privileges reach: a worker gives them up, and still runs VMs of other users' images.

mod common;
mod house;

use house::{House, counter};
use std::fs::Permissions;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::PathBuf;

/// A user that no file of the host's belongs to.
const SOMEBODY: u32 = 0x7fff_1234;

#[test]
fn root_runs_what_is_in_another_users_private_folder() {
    if !rustix::process::geteuid().is_root() {
        println!("left out: only root can make a folder of another user's");
        return;
    }
    let house = House::new();
    let theirs = house.path("theirs");
    std::fs::create_dir(&theirs).unwrap();
    let file = |name: &str| theirs.join(name);
    let text = |path: &PathBuf| path.to_str().unwrap().to_owned();
    let guest = text(&counter(&theirs));
    let [base, child, more, disc] = ["base.vhdx", "child.vhdx", "more.vhdx", "disc.iso"].map(|name| text(&file(name)));
    house.good(&["vhd", "new", &base, "8M"]);
    house.good(&["vhd", "new", &child, "--parent", &base]);
    house.good(&["vhd", "new", &more, "--parent", &base]);
    std::fs::write(&disc, vec![0; 1 << 20]).unwrap();
    for entry in std::fs::read_dir(&theirs).unwrap() {
        let path = entry.unwrap().path();
        std::fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
        chown(&path, Some(SOMEBODY), Some(SOMEBODY)).unwrap();
    }
    std::fs::set_permissions(&theirs, Permissions::from_mode(0o700)).unwrap();
    chown(&theirs, Some(SOMEBODY), Some(SOMEBODY)).unwrap();

    let new = ["vm", "new", "one", "--kernel", &guest, "--disk", &child, "--dvd", &disc];
    house.good(&[&new[..], &["--memory", "16M", "--engine", "soft"]].concat());
    house.good(&["vm", "start", "one"]);
    house.talk("one", "x", "up\nA");
    house.good(&["vm", "disk", "add", "one", &more]);
    // The kernel is loaded again, and from a saved state the disks are.
    house.good(&["vm", "restart", "one", "--reset"]);
    house.talk("one", "xy", "up\nAB");
    house.good(&["vm", "stop", "one", "--save"]);
    house.good(&["vm", "start", "one"]);
    house.talk("one", "x", "C");
    house.good(&["vm", "stop", "one", "--turn-off"]);
    // The image is locked as any other, and free again now.
    house.good(&["vhd", "check", &child]);

    // What is written by name while the machine runs.
    let run = ["run", "--engine", "soft", "--disk", &child, "--memory", "64M"];
    for (option, value) in [
        ("--save", text(&file("state"))),
        ("--variables", text(&file("variables"))),
        ("--serial", format!("file:{}", file("serial").display())),
    ] {
        house.bad(&[&run[..], &[option, &value]].concat(), 2, "only a privilege of this user's gives access to it");
    }
}
