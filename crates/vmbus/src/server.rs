//! The protocol of channel messages as a state machine: messages and host requests in, [`Output`]s out.

use crate::gpadl::{PageList, parse_ranges};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap, VecDeque};
use vmbus_protocol::message::{self as msg, Header, kind};
use vmbus_protocol::{
    DEFAULT_SINT, EVENT_CONNECTION, Guid, MAX_RELID, MESSAGE_CONNECTION, MESSAGE_CONNECTION_5, PAGE, USER_DATA, Version,
};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Connection of a channel's signals: this plus its relid.
pub const SIGNAL_CONNECTION_BASE: u32 = 0x2000;
/// GPADLs that a guest may have at once.
const MOST_GPADLS: usize = 8192;
/// Page numbers in all GPADLs of a guest (4 GiB of buffers).
const MOST_GPADL_PAGES: usize = 1 << 20;

/// What an offer is known by, in saved states too.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct OfferKey {
    /// Interface type.
    pub class: Guid,
    /// Instance.
    pub instance: Guid,
    /// 0: the primary channel.
    pub sub_channel: u16,
}

/// An offer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OfferParams {
    /// Identity.
    pub key: OfferKey,
    /// See [`msg::offer_flags`].
    pub flags: u16,
    /// MMIO that the device wants.
    pub mmio_megabytes: u16,
    /// User-defined data (with a pipe: the mode in the first dword).
    pub user_data: [u8; USER_DATA],
    /// The guest may signal through the monitor page.
    pub monitored: bool,
}

/// A guest's request to open a channel, validated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpenRequest {
    /// The ring buffer's pages.
    pub ring: PageList,
    /// First page of the ring from host to guest.
    pub downstream_page: u32,
    /// VP for interrupts.
    pub target_vp: u32,
    /// User-defined data.
    pub user_data: [u8; USER_DATA],
}

/// What the state machine wants done, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// A channel message for the guest.
    Message {
        /// VP.
        vp: u32,
        /// SINT.
        sint: u8,
        /// The message.
        payload: Vec<u8>,
    },
    /// Old messages for the guest are void.
    ClearMessages {
        /// VP.
        vp: u32,
        /// SINT.
        sint: u8,
    },
    /// Open the channel; [`Server::opened`] answers.
    Open(u32, Box<OpenRequest>),
    /// Close the channel: when that is done, its rings are the guest's again.
    Close(u32),
    /// The channel interrupts another VP from now on.
    Target(u32, u32),
    /// The guest has made a GPADL for the channel.
    GpadlReady(u32, u32),
    /// A GPADL of the channel goes away: when that is done, its pages are the guest's again.
    GpadlGone(u32, u32),
    /// The offer is gone for good; forget the channel.
    Forget(u32),
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Connection {
    version: u32,
    vp: u32,
    sint: u8,
    interrupt_page: u64,
    monitor_pages: [u64; 2],
    /// The guest has asked for offers.
    offers_wanted: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Use {
    Closed,
    /// [`Output::Open`] was given, the answer is missing.
    Opening,
    Open,
}

#[derive(Clone, Debug)]
struct Offered {
    params: OfferParams,
    /// The guest was told.
    told: bool,
    rescinded: bool,
    monitor_id: Option<u8>,
    usage: Use,
    open_id: u32,
    ring_gpadl: u32,
    downstream_page: u32,
    target_vp: u32,
    user_data: [u8; USER_DATA],
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Gpadl {
    relid: u32,
    /// Bytes of ranges: complete when as long as announced.
    bytes: Vec<u8>,
    announced: usize,
    range_count: u16,
    /// Decoded ranges, one list.
    list: Option<PageList>,
    /// Torn down while the channel uses it: the answer follows the close.
    teardown: bool,
}

/// A saved channel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedChannel {
    class: [u8; 16],
    instance: [u8; 16],
    sub_channel: u16,
    relid: u32,
    told: bool,
    rescinded: bool,
    monitor_id: Option<u8>,
    open: bool,
    open_id: u32,
    ring_gpadl: u32,
    downstream_page: u32,
    target_vp: u32,
    user_data: Vec<u8>,
}

/// Saved state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServerState {
    connection: Option<Connection>,
    channels: Vec<SavedChannel>,
    gpadls: Vec<(u32, Gpadl)>,
}

/// Why a saved state does not fit.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// A channel of the state has no device here.
    #[error("the saved VM has a channel of device {class} instance {instance} (number {sub}), which this VM has not")]
    NoDevice {
        /// Class.
        class: Guid,
        /// Instance.
        instance: Guid,
        /// Sub-channel.
        sub: u16,
    },
    /// The state contradicts itself.
    #[error("the saved VMBus state is damaged: {0}")]
    Damaged(&'static str),
}

/// The server. See the module page.
pub struct Server {
    vp_count: u32,
    newest: Version,
    connection: Option<Connection>,
    /// By relid.
    channels: BTreeMap<u32, Offered>,
    gpadls: HashMap<u32, Gpadl>,
    outputs: VecDeque<Output>,
}

fn parse<T: FromBytes + KnownLayout + Immutable>(payload: &[u8]) -> Option<T> {
    T::read_from_prefix(payload).ok().map(|(value, _)| value)
}

impl Server {
    /// A server that nobody has contacted. `newest` bounds what is negotiated.
    pub fn new(vp_count: u32, newest: Version) -> Self {
        Self {
            vp_count,
            newest,
            connection: None,
            channels: BTreeMap::new(),
            gpadls: HashMap::new(),
            outputs: VecDeque::new(),
        }
    }

    /// The next thing to do.
    pub fn next_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// The negotiated version.
    pub fn version(&self) -> Option<Version> {
        self.connection.as_ref().map(|c| Version(c.version))
    }

    /// SINT that the guest listens on.
    pub fn sint(&self) -> u8 {
        self.connection.as_ref().map_or(DEFAULT_SINT, |c| c.sint)
    }

    /// The interrupt page, where the version has one.
    pub fn interrupt_page(&self) -> Option<u64> {
        self.connection.as_ref().map(|c| c.interrupt_page).filter(|p| *p != 0)
    }

    /// The monitor page from guest to host.
    pub fn monitor_page(&self) -> Option<u64> {
        self.connection.as_ref().map(|c| c.monitor_pages[1]).filter(|p| *p != 0)
    }

    /// The channel with a monitor id.
    pub fn monitored(&self, id: u8) -> Option<u32> {
        self.channels.iter().find(|(_, c)| c.monitor_id == Some(id)).map(|(relid, _)| *relid)
    }

    /// Relid of an offer.
    pub fn relid(&self, key: &OfferKey) -> Option<u32> {
        self.channels.iter().find(|(_, c)| c.params.key == *key && !c.rescinded).map(|(relid, _)| *relid)
    }

    /// What the channel with this number is known by.
    pub fn key(&self, relid: u32) -> Option<OfferKey> {
        self.channels.get(&relid).map(|c| c.params.key)
    }

    /// Pages of a GPADL that the guest made for a channel.
    pub fn gpadl(&self, relid: u32, id: u32) -> Option<&PageList> {
        self.gpadls.get(&id).filter(|g| g.relid == relid && !g.teardown)?.list.as_ref()
    }

    fn send(&mut self, message: &(impl IntoBytes + Immutable)) {
        if let Some(c) = &self.connection {
            let payload = message.as_bytes().to_vec();
            self.outputs.push_back(Output::Message { vp: c.vp, sint: c.sint, payload });
        }
    }

    // --- requests of the host ---

    /// Offers a channel. `None`: the key is offered already, or all numbers are in use.
    pub fn offer(&mut self, params: OfferParams) -> Option<u32> {
        if self.relid(&params.key).is_some() {
            return None;
        }
        let relid = (1..=MAX_RELID).find(|r| !self.channels.contains_key(r))?;
        let monitor_id = params.monitored.then(|| (0..128).find(|id| self.monitored(*id).is_none())).flatten();
        self.channels.insert(
            relid,
            Offered {
                params,
                told: false,
                rescinded: false,
                monitor_id,
                usage: Use::Closed,
                open_id: 0,
                ring_gpadl: 0,
                downstream_page: 0,
                target_vp: 0,
                user_data: [0; USER_DATA],
            },
        );
        if self.connection.as_ref().is_some_and(|c| c.offers_wanted) {
            self.tell(relid);
        }
        Some(relid)
    }

    fn tell(&mut self, relid: u32) {
        let Some(c) = self.channels.get_mut(&relid) else { return };
        if c.rescinded {
            return;
        }
        c.told = true;
        let p = &c.params;
        let offer = msg::Offer {
            header: Header::new(kind::OFFER),
            class: p.key.class,
            instance: p.key.instance,
            reserved: [0; 2],
            flags: p.flags,
            mmio_megabytes: p.mmio_megabytes,
            user_data: p.user_data,
            sub_channel_index: p.key.sub_channel,
            reserved2: 0,
            relid,
            monitor_id: c.monitor_id.unwrap_or(0xff),
            monitor_allocated: u8::from(c.monitor_id.is_some()),
            dedicated_interrupt: u16::from(self.version() >= Some(Version::V1_1)),
            connection_id: match self.version() {
                Some(v) if v >= Version::V1_1 => SIGNAL_CONNECTION_BASE + relid,
                _ => EVENT_CONNECTION,
            },
        };
        self.send(&offer);
    }

    /// Takes an offer back: the channel is closed, the guest is told. Its sub-channels go too.
    pub fn rescind(&mut self, relid: u32) {
        let Some(c) = self.channels.get(&relid) else { return };
        let key = c.params.key;
        if key.sub_channel == 0 {
            self.rescind_sub_channels(key);
        }
        self.close(relid);
        let Some(c) = self.channels.get_mut(&relid) else { return };
        if c.rescinded {
            return;
        }
        if c.told && self.connection.is_some() {
            c.rescinded = true;
            self.send(&msg::Relid { header: Header::new(kind::RESCIND), relid });
        } else {
            self.forget(relid);
        }
    }

    fn rescind_sub_channels(&mut self, key: OfferKey) {
        let subs: Vec<u32> = self
            .channels
            .iter()
            .filter(|(_, c)| {
                let k = c.params.key;
                k.instance == key.instance && k.class == key.class && k.sub_channel != 0 && !c.rescinded
            })
            .map(|(relid, _)| *relid)
            .collect();
        for relid in subs {
            self.rescind(relid);
        }
    }

    fn forget(&mut self, relid: u32) {
        let ids: Vec<u32> = self.gpadls.iter().filter(|(_, g)| g.relid == relid).map(|(id, _)| *id).collect();
        for id in ids {
            self.gpadls.remove(&id);
            self.outputs.push_back(Output::GpadlGone(relid, id));
        }
        if self.channels.remove(&relid).is_some() {
            self.outputs.push_back(Output::Forget(relid));
        }
    }

    /// The device has lost its channel (the guest lied in a ring): it is closed, whatever the guest believes. The guest
    /// may open it again.
    pub fn fail(&mut self, relid: u32) {
        self.close(relid);
    }

    /// Answers [`Output::Open`].
    pub fn opened(&mut self, relid: u32, success: bool) {
        let Some(c) = self.channels.get_mut(&relid).filter(|c| c.usage == Use::Opening) else { return };
        c.usage = if success { Use::Open } else { Use::Closed };
        let open_id = c.open_id;
        self.open_result(relid, open_id, success);
    }

    fn open_result(&mut self, relid: u32, open_id: u32, success: bool) {
        let status = if success { msg::STATUS_SUCCESS } else { msg::STATUS_UNSUCCESSFUL };
        self.send(&msg::OpenResult { header: Header::new(kind::OPEN_RESULT), relid, open_id, status });
    }

    /// Back to the state after power-on; offers stay.
    pub fn reset(&mut self) {
        self.disconnect();
        self.connection = None;
    }

    fn disconnect(&mut self) {
        let relids: Vec<u32> = self.channels.keys().copied().collect();
        for relid in relids {
            self.close(relid);
            let Some(c) = self.channels.get_mut(&relid) else { continue };
            c.told = false;
            // Sub-channels are made on request of the next guest.
            if c.rescinded || c.params.key.sub_channel != 0 {
                self.forget(relid);
            }
        }
        for (id, gpadl) in std::mem::take(&mut self.gpadls) {
            self.outputs.push_back(Output::GpadlGone(gpadl.relid, id));
        }
    }

    // --- messages of the guest ---

    /// One channel message of the guest. What is malformed or out of place is ignored, as Hyper-V does.
    pub fn message(&mut self, payload: &[u8]) {
        let done = self.handle(payload);
        if done.is_none() {
            let kind = parse::<Header>(payload).map(|h| h.kind);
            tracing::debug!(?kind, len = payload.len(), "channel message ignored");
        }
    }

    fn handle(&mut self, payload: &[u8]) -> Option<()> {
        let header: Header = parse(payload)?;
        let message = header.kind;
        if message == kind::INITIATE_CONTACT {
            return self.initiate_contact(payload);
        }
        let connection = self.connection.as_mut()?;
        match message {
            kind::REQUEST_OFFERS => {
                connection.offers_wanted = true;
                let relids: Vec<u32> = self.channels.iter().filter(|(_, c)| !c.told).map(|(r, _)| *r).collect();
                relids.into_iter().for_each(|relid| self.tell(relid));
                self.send(&Header::new(kind::ALL_OFFERS_DELIVERED));
            }
            kind::OPEN => self.open(&parse(payload)?)?,
            kind::CLOSE => {
                let relid = parse::<msg::Relid>(payload)?.relid;
                let key = self.channels.get(&relid)?.params.key;
                self.close(relid);
                if key.sub_channel == 0 {
                    self.rescind_sub_channels(key);
                }
            }
            kind::GPADL_HEADER => self.gpadl_header(payload)?,
            kind::GPADL_BODY => self.gpadl_body(payload)?,
            kind::GPADL_TEARDOWN => self.gpadl_teardown(&parse(payload)?)?,
            kind::RELID_RELEASED => {
                let relid = parse::<msg::Relid>(payload)?.relid;
                self.channels.get(&relid).filter(|c| c.rescinded)?;
                self.forget(relid);
            }
            kind::MODIFY => self.modify(&parse(payload)?)?,
            kind::UNLOAD => {
                self.disconnect();
                self.send(&Header::new(kind::UNLOAD_RESPONSE));
                self.connection = None;
            }
            kind::TL_CONNECT_REQUEST => {
                // Nobody listens on sockets.
                let m: msg::TlConnectRequest = parse(payload)?;
                self.send(&msg::TlConnectResult {
                    header: Header::new(kind::TL_CONNECT_RESULT),
                    endpoint: m.endpoint,
                    service: m.service,
                    status: msg::STATUS_CONNECTION_REFUSED,
                });
            }
            _ => return None,
        }
        Some(())
    }

    fn initiate_contact(&mut self, payload: &[u8]) -> Option<()> {
        let m: msg::InitiateContact = parse(payload)?;
        let version = Version(m.version);
        let supported = Version::ALL.contains(&version) && version <= self.newest;
        let five = version >= Version::V5_0;
        // The target VP exists from 2.4 on in guests; older ones leave zero there. A VP that is not there cannot be
        // answered.
        let vp = m.target_vp;
        let sint = if five { m.interrupt_page_or_sint as u8 } else { DEFAULT_SINT };
        if vp >= self.vp_count || sint == 0 || sint > 15 {
            return None;
        }
        // A guest that starts anew (kexec, or a reset that we did not see) has dropped everything.
        self.disconnect();
        self.outputs.push_back(Output::ClearMessages { vp, sint });
        self.connection = Some(Connection {
            version: m.version,
            vp,
            sint,
            interrupt_page: if five { 0 } else { m.interrupt_page_or_sint & !(PAGE as u64 - 1) },
            monitor_pages: [m.monitor_page1, m.monitor_page2],
            offers_wanted: false,
        });
        let connection_id = if five { MESSAGE_CONNECTION_5 } else { MESSAGE_CONNECTION };
        self.send(&msg::VersionResponse {
            header: Header::new(kind::VERSION_RESPONSE),
            supported: u8::from(supported),
            connection_state: 0,
            padding: 0,
            connection_id,
        });
        if supported {
            tracing::info!(%version, vp, sint, "the guest has connected to VMBus");
        } else {
            self.connection = None;
        }
        Some(())
    }

    fn open(&mut self, m: &msg::Open) -> Option<()> {
        let (relid, open_id) = (m.relid, m.open_id);
        let request = self.open_request(m);
        let c = self.channels.get_mut(&relid).filter(|c| c.told)?;
        match request {
            Some(request) if c.usage == Use::Closed && !c.rescinded => {
                c.usage = Use::Opening;
                c.open_id = open_id;
                c.ring_gpadl = m.ring_gpadl;
                c.downstream_page = m.downstream_page;
                c.target_vp = m.target_vp;
                c.user_data = m.user_data;
                self.outputs.push_back(Output::Open(relid, Box::new(request)));
            }
            _ => self.open_result(relid, open_id, false),
        }
        Some(())
    }

    fn open_request(&self, m: &msg::Open) -> Option<OpenRequest> {
        let ring = self.gpadl(m.relid, m.ring_gpadl)?;
        let pages = u32::try_from(ring.pages.len()).ok()?;
        // Each ring has a control page and at least one page of data.
        let downstream = m.downstream_page;
        if downstream < 2 || pages < 4 || downstream > pages - 2 || m.target_vp >= self.vp_count {
            return None;
        }
        Some(OpenRequest {
            ring: ring.clone(),
            downstream_page: downstream,
            target_vp: m.target_vp,
            user_data: m.user_data,
        })
    }

    fn close(&mut self, relid: u32) {
        let Some(c) = self.channels.get_mut(&relid).filter(|c| c.usage != Use::Closed) else { return };
        c.usage = Use::Closed;
        let ring = c.ring_gpadl;
        self.outputs.push_back(Output::Close(relid));
        if self.gpadls.get(&ring).is_some_and(|g| g.teardown) {
            self.torn_down(ring);
        }
    }

    fn gpadl_header(&mut self, payload: &[u8]) -> Option<()> {
        let m: msg::GpadlHeader = parse(payload)?;
        let (id, relid) = (m.gpadl, m.relid);
        let announced = usize::from(m.range_bytes);
        let rest = payload.get(size_of::<msg::GpadlHeader>()..)?;
        let pages: usize = self.gpadls.values().map(|g| g.announced / 8).sum();
        let possible = self.channels.get(&relid).is_some_and(|c| c.told)
            && !self.gpadls.contains_key(&id)
            && self.gpadls.len() < MOST_GPADLS
            && pages + announced / 8 <= MOST_GPADL_PAGES
            && id != 0;
        if !possible || announced < 8 || m.range_count == 0 {
            // Without an entry no body of it is taken.
            self.gpadl_created(relid, id, false);
            return Some(());
        }
        let bytes = rest[..rest.len().min(announced)].to_vec();
        self.gpadls
            .insert(id, Gpadl { relid, bytes, announced, range_count: m.range_count, list: None, teardown: false });
        self.gpadl_complete(id);
        Some(())
    }

    fn gpadl_body(&mut self, payload: &[u8]) -> Option<()> {
        let m: msg::GpadlBody = parse(payload)?;
        let rest = payload.get(size_of::<msg::GpadlBody>()..)?;
        let gpadl = self.gpadls.get_mut(&{ m.gpadl }).filter(|g| g.list.is_none())?;
        let missing = gpadl.announced - gpadl.bytes.len();
        gpadl.bytes.extend_from_slice(&rest[..rest.len().min(missing)]);
        self.gpadl_complete(m.gpadl);
        Some(())
    }

    /// Decodes a GPADL whose last part has come.
    fn gpadl_complete(&mut self, id: u32) {
        let Some(gpadl) = self.gpadls.get_mut(&id).filter(|g| g.bytes.len() >= g.announced) else { return };
        let relid = gpadl.relid;
        let ranges = parse_ranges(&gpadl.bytes, usize::from(gpadl.range_count));
        gpadl.bytes = Vec::new();
        match ranges {
            Ok(ranges) => {
                // Rings and buffers are whole pages.
                let pages = ranges.into_iter().flat_map(|r| r.list.pages).collect();
                gpadl.list = Some(PageList { pages });
                self.outputs.push_back(Output::GpadlReady(relid, id));
                self.gpadl_created(relid, id, true);
            }
            Err(_) => {
                self.gpadls.remove(&id);
                self.gpadl_created(relid, id, false);
            }
        }
    }

    fn gpadl_created(&mut self, relid: u32, gpadl: u32, success: bool) {
        let status = if success { msg::STATUS_SUCCESS } else { msg::STATUS_UNSUCCESSFUL };
        self.send(&msg::GpadlCreated { header: Header::new(kind::GPADL_CREATED), relid, gpadl, status });
    }

    fn gpadl_teardown(&mut self, m: &msg::GpadlTeardown) -> Option<()> {
        let (id, relid) = (m.gpadl, m.relid);
        let used = self.channels.get(&relid).is_some_and(|c| c.usage != Use::Closed && c.ring_gpadl == id);
        match self.gpadls.get_mut(&id).filter(|g| g.relid == relid) {
            // The answer follows when the channel is closed.
            Some(gpadl) if used => gpadl.teardown = true,
            _ => self.torn_down(id),
        }
        Some(())
    }

    fn torn_down(&mut self, gpadl: u32) {
        if let Some(g) = self.gpadls.remove(&gpadl) {
            self.outputs.push_back(Output::GpadlGone(g.relid, gpadl));
        }
        // Answered even if we do not know it: a guest waits for this without end.
        self.send(&msg::GpadlTorndown { header: Header::new(kind::GPADL_TORNDOWN), gpadl });
    }

    fn modify(&mut self, m: &msg::Modify) -> Option<()> {
        let (relid, vp) = (m.relid, m.target_vp);
        let vp_count = self.vp_count;
        let c = self.channels.get_mut(&relid).filter(|c| c.told && vp < vp_count);
        let success = c.is_some();
        if let Some(c) = c {
            c.target_vp = vp;
            self.outputs.push_back(Output::Target(relid, vp));
        }
        if self.version() >= Some(Version::V5_3) {
            let status = if success { msg::STATUS_SUCCESS } else { msg::STATUS_UNSUCCESSFUL };
            self.send(&msg::ModifyResponse { header: Header::new(kind::MODIFY_RESPONSE), relid, status });
        }
        Some(())
    }

    // --- saving ---

    /// The state. All outputs must have been taken.
    pub fn save(&self) -> ServerState {
        let channels = self
            .channels
            .iter()
            .map(|(relid, c)| SavedChannel {
                class: c.params.key.class.0,
                instance: c.params.key.instance.0,
                sub_channel: c.params.key.sub_channel,
                relid: *relid,
                told: c.told,
                rescinded: c.rescinded,
                monitor_id: c.monitor_id,
                open: c.usage == Use::Open,
                open_id: c.open_id,
                ring_gpadl: c.ring_gpadl,
                downstream_page: c.downstream_page,
                target_vp: c.target_vp,
                user_data: c.user_data.to_vec(),
            })
            .collect();
        let mut gpadls: Vec<_> = self.gpadls.iter().map(|(id, g)| (*id, g.clone())).collect();
        gpadls.sort_by_key(|(id, _)| *id);
        ServerState { connection: self.connection.clone(), channels, gpadls }
    }

    /// Loads a state: channels that are offered now take the numbers that they had; `find` gives the offers of
    /// sub-channels, which nobody has offered yet. Returns the channels to open, as [`Output::Open`] would.
    pub fn restore(
        &mut self,
        state: &ServerState,
        mut find: impl FnMut(&OfferKey) -> Option<OfferParams>,
    ) -> Result<Vec<(u32, OpenRequest)>, RestoreError> {
        let damaged = RestoreError::Damaged;
        if let Some(c) = &state.connection
            && (c.vp >= self.vp_count || c.sint == 0 || c.sint > 15)
        {
            return Err(damaged("the VP or SINT of the connection does not exist"));
        }
        let mut offered: BTreeMap<u32, Offered> = std::mem::take(&mut self.channels);
        let mut channels = BTreeMap::new();
        for saved in &state.channels {
            let key =
                OfferKey { class: Guid(saved.class), instance: Guid(saved.instance), sub_channel: saved.sub_channel };
            if saved.relid == 0 || saved.relid > MAX_RELID || saved.target_vp >= self.vp_count {
                return Err(damaged("a channel's number or VP is out of range"));
            }
            let here = offered.iter().find(|(_, c)| c.params.key == key).map(|(relid, _)| *relid);
            let params = here.and_then(|relid| offered.remove(&relid)).map(|c| c.params).or_else(|| find(&key));
            let params = match params {
                Some(params) => params,
                // A device that was removed, of which only the guest's release is missing.
                None if saved.rescinded => {
                    OfferParams { key, flags: 0, mmio_megabytes: 0, user_data: [0; USER_DATA], monitored: false }
                }
                None => {
                    return Err(RestoreError::NoDevice {
                        class: key.class,
                        instance: key.instance,
                        sub: key.sub_channel,
                    });
                }
            };
            let user_data = saved.user_data.as_slice().try_into().map_err(|_| damaged("user data is not 120 bytes"))?;
            let channel = Offered {
                params,
                told: saved.told,
                rescinded: saved.rescinded,
                monitor_id: saved.monitor_id,
                usage: Use::Closed,
                open_id: saved.open_id,
                ring_gpadl: saved.ring_gpadl,
                downstream_page: saved.downstream_page,
                target_vp: saved.target_vp,
                user_data,
            };
            if channels.insert(saved.relid, channel).is_some() {
                return Err(damaged("two channels have the same number"));
            }
        }
        self.channels = channels;
        self.connection = state.connection.clone();
        self.gpadls = state.gpadls.iter().cloned().collect();
        if self.gpadls.values().any(|g| g.bytes.len() > g.announced) {
            return Err(damaged("a GPADL is longer than announced"));
        }
        // Devices that are new in this VM are offered under free numbers.
        for c in offered.into_values() {
            self.offer(c.params);
        }
        for (id, gpadl) in &self.gpadls {
            self.outputs.push_back(Output::GpadlReady(gpadl.relid, *id));
        }
        let mut open = Vec::new();
        for saved in state.channels.iter().filter(|s| s.open) {
            let request = self.open_request(&msg::Open {
                header: Header::new(kind::OPEN),
                relid: saved.relid,
                open_id: saved.open_id,
                ring_gpadl: saved.ring_gpadl,
                target_vp: saved.target_vp,
                downstream_page: saved.downstream_page,
                user_data: self.channels[&saved.relid].user_data,
            });
            let request = request.ok_or(damaged("an open channel has no ring"))?;
            if let Some(c) = self.channels.get_mut(&saved.relid) {
                c.usage = Use::Open;
            }
            open.push((saved.relid, request));
        }
        Ok(open)
    }
}
