//! The list of guest tests.

use super::firmware::Scenario;
use super::hosted::Stage;
use super::hyperv;
use crate::guests::busybox_for;
use crate::initramfs::Contents;
use anyhow::Result;

/// One test.
pub struct Case {
    /// Name, as `boot/bookworm-cloud/1vp`.
    pub name: String,
    /// Whether it is left out of the ordinary run, for its duration.
    pub long: bool,
    /// Whether it checks Viridian's own behaviour and means nothing on another program.
    pub viridian_only: bool,
    /// What is done.
    pub work: Work,
}

/// What a test does.
pub enum Work {
    /// Boots a kernel.
    Boot(Box<Boot>),
    /// Gives bad arguments.
    Usage,
    /// Starts from the firmware.
    Firmware(Scenario),
}

/// A boot and what must come of it.
pub struct Boot {
    /// Kernel of the catalogue.
    pub kernel: &'static str,
    /// Virtual processors.
    pub processors: u32,
    /// Guest memory in MiB.
    pub memory_mib: u32,
    /// Kernel command line after the console.
    pub append: String,
    /// Time limit on an idle machine.
    pub seconds: u32,
    /// What is typed into the serial line.
    pub input: Option<Input>,
    /// What must be seen.
    pub expect: Expect,
    /// Size in MiB of an empty dynamic VHDX that the guest gets on VMBus.
    pub disk_mib: Option<u32>,
    /// Modules to load.
    pub modules: &'static [&'static str],
    /// Programs as (tool, path).
    pub programs: &'static [(&'static str, &'static str)],
    /// More options of `viridian run`.
    pub options: &'static [&'static str],
    /// Programs go to a root file system on the first disk; the image has only what brings it up.
    pub on_disk: bool,
    /// Further things of the catalogue that the host's side needs.
    pub host_tools: &'static [&'static str],
    /// Tool of the catalogue with the guest's shell and small commands.
    pub busybox: &'static str,
    /// The image has the program under test, too, and [`nested::SPINNING`], a guest for it.
    pub nested: bool,
    /// Counters of `--stats` with the least value at the end.
    pub counters: &'static [(&'static str, u64)],
}

/// Typed text.
pub struct Input {
    /// It is typed when this was seen.
    pub after: &'static str,
    /// The text.
    pub text: &'static str,
}

/// What must come of a boot.
pub enum Expect {
    /// The script's verdict is PASS, then the guest powers off and the program ends with status 0.
    Verdict,
    /// These texts appear, then the guest powers off and the program ends with status 0.
    Text(&'static [&'static str]),
    /// This text appears; then the machine is ended from outside.
    Stops(&'static str),
    /// The guest boots this many times in one run of the program.
    Boots(usize),
    /// The program ends with an error that shows the processor's state.
    TripleFault,
    /// On a terminal: raw while the guest has it, the documented key leaves, and the settings come back.
    Terminal,
    /// The guest panics and tells the host through Hyper-V's crash registers, with the kernel's last words.
    CrashReport,
    /// The guest's script and the host work together.
    Scenario(fn(&Stage) -> Result<()>),
    /// Saved when this text appears, restored by another process, where it goes on to a verdict of PASS.
    SaveAndRestore(&'static str),
}

impl Case {
    /// Processors of the host that the test keeps busy.
    pub fn processors(&self) -> u32 {
        match &self.work {
            Work::Boot(boot) => boot.processors,
            Work::Usage => 1,
            Work::Firmware(scenario) => scenario.processors(),
        }
    }
}

impl Case {
    /// Memory of the guest in MiB.
    pub fn memory_mib(&self) -> u32 {
        match &self.work {
            Work::Boot(boot) => boot.memory_mib,
            Work::Usage => 0,
            Work::Firmware(_) => 1024,
        }
    }
}

impl Boot {
    fn new(kernel: &'static str, processors: u32, append: impl Into<String>) -> Self {
        Self {
            kernel,
            processors,
            memory_mib: 512,
            append: append.into(),
            seconds: 300,
            input: None,
            expect: Expect::Verdict,
            disk_mib: None,
            modules: &[],
            programs: &[],
            options: &[],
            on_disk: false,
            host_tools: &[],
            busybox: busybox_for(kernel),
            nested: false,
            counters: &[],
        }
    }

    /// Catalogue names of the tools that the image needs.
    pub fn tools(&self) -> impl Iterator<Item = &'static str> {
        self.programs.iter().map(|(tool, _)| *tool).chain(self.host_tools.iter().copied()).chain([self.busybox])
    }

    /// What goes into the image.
    pub fn contents(&self) -> Contents {
        Contents {
            modules: self.modules.iter().map(|m| (*m).to_owned()).collect(),
            busybox: self.busybox,
            programs: if self.on_disk { Vec::new() } else { self.all_programs() },
            ..Contents::default()
        }
    }

    /// What goes into the root file system, if there is one.
    pub fn root_contents(&self) -> Contents {
        Contents { programs: self.all_programs(), ..Contents::default() }
    }

    fn all_programs(&self) -> Vec<(String, String)> {
        self.programs.iter().map(|(tool, path)| ((*tool).to_owned(), (*path).to_owned())).collect()
    }
}

const KERNELS: &[&str] = &["bookworm-cloud", "bookworm-generic", "trixie-cloud"];
/// The script `check true`.
const CHECK_TRUE: &str = "viridian.run=Y2hlY2sgdHJ1ZQo=";
const STRESS: &[(&str, &str)] = &[("stress-ng", "usr/bin/stress-ng")];

const HYPERV: &[&str] = &["hv_vmbus", "sd_mod", "hv_storvsc", "hv_utils"];
const HYPERV_DISKS: &[&str] = &["hv_vmbus", "sd_mod", "sr_mod", "hv_storvsc", "hv_utils", "isofs"];
const HYPERV_SERVICES: &[&str] = &["hv_vmbus", "sd_mod", "hv_storvsc", "hv_utils", "dummy"];
/// Counters of a guest with one processor, and with more: only then are there others to interrupt and to flush.
const ON_ONE: &[(&str, u64)] = &[("timer_expirations", 50), ("events_from_guest", 50), ("messages_from_guest", 10)];
const ON_MANY: &[(&str, u64)] = &[
    ("timer_expirations", 50),
    ("events_from_guest", 50),
    ("messages_from_guest", 10),
    ("ipi_hypercalls", 100),
    ("flush_hypercalls", 1000),
];
const DISK_PROGRAMS: &[(&str, &str)] = &[
    ("fio", "usr/bin/fio"),
    ("disk-tools", "sbin/mke2fs"),
    ("disk-tools", "sbin/resize2fs"),
    ("eject", "usr/bin/eject"),
];
const DAEMONS: &[(&str, &str)] = &[
    ("hyperv-daemons", "usr/sbin/hv_kvp_daemon"),
    ("hyperv-daemons", "usr/sbin/hv_vss_daemon"),
    ("hyperv-daemons", "usr/sbin/hv_fcopy_daemon"),
    ("disk-tools", "sbin/mke2fs"),
];
const SAVE_PROGRAMS: &[(&str, &str)] =
    &[("fio", "usr/bin/fio"), ("disk-tools", "sbin/mke2fs"), ("hyperv-daemons", "usr/sbin/hv_fcopy_daemon")];

/// Scenarios of Hyper-V's devices in which the host takes part.
fn hyperv_scenarios() -> Vec<Case> {
    let scenario = |name: &str, boot: Boot| Case {
        name: format!("hyperv/{name}"),
        long: false,
        viridian_only: true,
        work: Work::Boot(Box::new(boot)),
    };
    vec![
        scenario(
            "disks",
            Boot {
                expect: Expect::Scenario(hyperv::disks),
                modules: HYPERV_DISKS,
                programs: DISK_PROGRAMS,
                on_disk: true,
                counters: &[("scsi_sub_channel_commands", 500), ("flush_hypercalls", 500), ("ipi_hypercalls", 100)],
                ..Boot::new(
                    "bookworm-cloud",
                    3,
                    "quiet viridian.root=lun0 viridian.test=hyperv-disks viridian.args=3 viridian.after=wait",
                )
            },
        ),
        scenario(
            "services",
            Boot {
                expect: Expect::Scenario(hyperv::services),
                modules: HYPERV_SERVICES,
                programs: DAEMONS,
                ..Boot::new("bookworm-cloud", 2, "quiet viridian.test=hyperv-services viridian.after=wait")
            },
        ),
        scenario(
            "file-copy-uio",
            Boot {
                expect: Expect::Scenario(hyperv::file_copy),
                modules: &["hv_vmbus", "uio_hv_generic"],
                programs: &[("fcopy-uio-daemon", "usr/sbin/hv_fcopy_uio_daemon")],
                ..Boot::new("trixie-cloud", 2, "quiet viridian.test=hyperv-file-copy viridian.after=wait")
            },
        ),
        scenario(
            "save-in-use",
            Boot {
                expect: Expect::Scenario(hyperv::save),
                modules: HYPERV,
                programs: SAVE_PROGRAMS,
                on_disk: true,
                ..Boot::new("bookworm-cloud", 3, "quiet viridian.root=lun0 viridian.test=hyperv-save")
            },
        ),
        scenario(
            "power-cut",
            Boot {
                expect: Expect::Scenario(hyperv::cut),
                modules: HYPERV,
                programs: DISK_PROGRAMS,
                host_tools: &["disk-tools"],
                ..Boot::new("bookworm-cloud", 2, "quiet viridian.test=hyperv-cut viridian.args=cut")
            },
        ),
    ]
}

/// All tests. `long_seconds` is the duration of the long stress run.
pub fn all(long_seconds: u32) -> Vec<Case> {
    let boot = |name: &str, boot: Boot| Case {
        name: name.to_owned(),
        long: false,
        viridian_only: false,
        work: Work::Boot(Box::new(boot)),
    };
    let mut cases =
        vec![Case { name: "run/bad-arguments".to_owned(), long: false, viridian_only: true, work: Work::Usage }];
    for kernel in KERNELS {
        for processors in [1, 2, 4] {
            let append = format!("viridian.test=smoke viridian.args={processors},400");
            cases.push(boot(&format!("boot/{kernel}/{processors}vp"), Boot::new(kernel, processors, append)));
        }
    }
    // 32-bit code: a kernel, and programs on a 64-bit kernel.
    for processors in [1, 2] {
        let append = format!("viridian.test=smoke viridian.args={processors},400");
        cases.push(boot(&format!("boot/bookworm-686/{processors}vp"), Boot::new("bookworm-686", processors, append)));
    }
    cases.push(boot(
        "boot/bookworm-cloud/32-bit-programs",
        Boot {
            busybox: busybox_for("bookworm-686"),
            ..Boot::new("bookworm-cloud", 1, "viridian.test=smoke viridian.args=1,400")
        },
    ));
    cases.push(boot(
        "boot/bookworm-cloud/large-memory",
        Boot { memory_mib: 4608, ..Boot::new("bookworm-cloud", 1, "viridian.test=smoke viridian.args=1,4300") },
    ));
    cases.push(boot(
        "shell/types-and-powers-off",
        Boot {
            input: Some(Input {
                after: "viridian:",
                text: "echo answer-$((6 * 7))\nsleep 60 &\njobs | sed s/Running/job-runs/\npoweroff -f\n",
            }),
            expect: Expect::Text(&["answer-42", "job-runs"]),
            ..Boot::new("bookworm-cloud", 1, "quiet")
        },
    ));
    cases.push(boot(
        "reset/reboot-boots-again",
        Boot {
            expect: Expect::Boots(2),
            ..Boot::new("bookworm-cloud", 1, "quiet viridian.test=smoke viridian.args=1,400 viridian.after=reboot")
        },
    ));
    for (name, method) in [("keyboard", "k"), ("acpi", "a"), ("pci", "p")] {
        let mut case = boot(
            &format!("reset/{name}"),
            Boot {
                expect: Expect::Boots(2),
                // An empty script checks nothing and fails, which is no matter here: it must only come to its end.
                ..Boot::new("bookworm-cloud", 1, format!("quiet reboot={method} {CHECK_TRUE} viridian.after=reboot"))
            },
        );
        case.long = true;
        cases.push(case);
    }
    let mut triple_fault = boot(
        "reset/triple-fault-is-an-error",
        Boot {
            expect: Expect::TripleFault,
            ..Boot::new("bookworm-cloud", 1, format!("quiet reboot=t {CHECK_TRUE} viridian.after=reboot"))
        },
    );
    triple_fault.viridian_only = true;
    cases.push(triple_fault);
    let mut terminal =
        boot("terminal/raw-and-restored", Boot { expect: Expect::Terminal, ..Boot::new("bookworm-cloud", 1, "quiet") });
    terminal.viridian_only = true;
    cases.push(terminal);
    for processors in [1, 2] {
        let mut save = boot(
            &format!("save/running-guest/{processors}vp"),
            Boot {
                expect: Expect::SaveAndRestore("VIRIDIAN-NOTE: half"),
                ..Boot::new(
                    "bookworm-cloud",
                    processors,
                    format!("quiet viridian.test=checksums viridian.args={processors}"),
                )
            },
        );
        save.viridian_only = true;
        cases.push(save);
    }
    let kernels = ["bookworm-cloud", "bookworm-generic", "trixie-cloud"];
    for (kernel, processors) in kernels.into_iter().flat_map(|kernel| [1, 2, 4].map(|n| (kernel, n))) {
        let mut case = boot(
            &format!("hyperv/{kernel}/{processors}vp"),
            Boot {
                disk_mib: Some(128),
                modules: HYPERV,
                programs: STRESS,
                counters: if processors == 1 { ON_ONE } else { ON_MANY },
                ..Boot::new(kernel, processors, format!("viridian.test=hyperv viridian.args={processors}"))
            },
        );
        case.viridian_only = true;
        cases.push(case);
    }
    // Every block is executed by the interpreter and by its translation: slow, so the generic kernel is for the long run.
    for (kernel, expect, long) in [
        ("bookworm-cloud", Expect::Stops("Run /init as init process"), false),
        ("bookworm-cloud", Expect::Verdict, true),
        ("bookworm-generic", Expect::Verdict, true),
        ("bookworm-686", Expect::Verdict, true),
    ] {
        let mut case = boot(
            &format!("translate/verify/{kernel}{}", if long { "" } else { "/early" }),
            Boot { seconds: 1800, expect, options: &["--translate", "verify"], ..Boot::new(kernel, 1, CHECK_TRUE) },
        );
        case.long = long;
        case.viridian_only = true;
        cases.push(case);
    }
    let mut crash = boot(
        "hyperv/crash-report",
        Boot {
            expect: Expect::CrashReport,
            options: &["--hyperv", "on"],
            // echo c > /proc/sysrq-trigger
            ..Boot::new("bookworm-cloud", 2, "quiet viridian.run=ZWNobyBjID4gL3Byb2Mvc3lzcnEtdHJpZ2dlcgo=")
        },
    );
    crash.viridian_only = true;
    cases.push(crash);
    cases.extend(hyperv_scenarios());
    for scenario in Scenario::ALL {
        cases.push(Case {
            name: format!("firmware/{}", scenario.name()),
            long: scenario.is_long(),
            viridian_only: true,
            work: Work::Firmware(scenario),
        });
    }
    let mut life = boot(
        "vm/life",
        Boot {
            expect: Expect::Scenario(super::life::life),
            modules: &["hv_vmbus", "sd_mod", "hv_storvsc", "hv_utils"],
            ..Boot::new("bookworm-cloud", 2, "quiet")
        },
    );
    life.viridian_only = true;
    cases.push(life);
    let mut limits = boot(
        "vm/limits",
        Boot {
            nested: true,
            memory_mib: 1024,
            seconds: 600,
            ..Boot::new("trixie-cloud", 2, "quiet viridian.test=limits")
        },
    );
    limits.viridian_only = true;
    cases.push(limits);
    let stress = |seconds: u32| Boot {
        programs: STRESS,
        seconds: 300 + 6 * seconds,
        ..Boot::new("bookworm-cloud", 2, format!("viridian.test=stress viridian.args={seconds}"))
    };
    cases.push(boot("stress/verify", stress(10)));
    // All user code that can be is executed directly, pay or not.
    let mut direct = boot("stress/direct", Boot { options: &["--direct", "always"], ..stress(10) });
    direct.viridian_only = true;
    cases.push(direct);
    let mut long = boot("stress/verify-long", stress(long_seconds));
    long.long = true;
    cases.push(long);
    cases
}
