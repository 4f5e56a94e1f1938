//! What `viridian run` and `viridian vm set` ask for in the same words.

use clap::ValueEnum;
use vmms::config::Engine;
use worker::EngineChoice;

/// What executes the guest.
#[derive(Clone, Copy, ValueEnum)]
pub enum EngineArg {
    Auto,
    Soft,
    Kvm,
}

impl From<EngineArg> for Engine {
    fn from(arg: EngineArg) -> Self {
        match arg {
            EngineArg::Auto => Self::Auto,
            EngineArg::Soft => Self::Soft,
            EngineArg::Kvm => Self::Kvm,
        }
    }
}

impl From<EngineArg> for EngineChoice {
    fn from(arg: EngineArg) -> Self {
        match arg {
            EngineArg::Auto => Self::Auto,
            EngineArg::Soft => Self::Soft,
            EngineArg::Kvm => Self::Kvm,
        }
    }
}

/// A switch.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum OnOff {
    On,
    Off,
}

impl OnOff {
    /// Is it on?
    pub fn is_on(self) -> bool {
        self == Self::On
    }
}
