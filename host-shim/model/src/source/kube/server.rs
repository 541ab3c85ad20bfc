//! The API server as all tasks of the node see it: one client, one set of credentials, and one
//! back-off while it is away.
//!
//! While the server does not answer, or answers 502, 503 or 504, the tasks take turns: one attempt
//! of one of them at a time is due, the pause between two is an eighth of the time the server has
//! been away, and the first answer wakes all. So a server that was away for eight seconds is found
//! within a second, and one that was away for long is not swamped when it returns. A pause that the
//! server asks for (`Retry-After`) is kept by the task that was asked, whatever the others find.

use std::cell::RefCell;
use std::time::Duration;

use http::{Response, StatusCode};
use kube::Client;
use kube::client::Body;
use tokio::sync::{Mutex, Notify};
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::access::Access;
use super::answer::{refusal, retry_after};
use super::back_off::jittered;
use super::request::Ask;
use super::{Kubernetes, Patience};

/// Between two attempts the pause is this part of the time that the server has been away.
const PAUSE: u32 = 8;
/// An attempt may take this part of the time that the server has been away.
const ATTEMPT: u32 = 4;

/// The server, for all tasks of one thread.
#[derive(Debug)]
pub(crate) struct Server {
    access: Access,
    patience: Patience,
    /// Held while credentials are read, so that they are read once for all who miss them.
    client: Mutex<Credentials>,
    outage: RefCell<Option<Outage>>,
    returned: Notify,
}

/// A client, and how many there were before it.
#[derive(Default)]
struct Credentials {
    generation: u64,
    client: Option<Client>,
}

impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Credentials")
            .field(&self.generation)
            .finish()
    }
}

/// The server is away.
#[derive(Clone, Copy, Debug)]
struct Outage {
    since: Instant,
    /// When the next attempt is due.
    next: Instant,
}

/// Why a request has no answer of use. Times are what the server asked to be left alone for.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The place in history is gone.
    Expired,
    /// There is no such thing (404), or, if `forbidden` (403), this node may not know.
    Absent { forbidden: bool, reason: String },
    /// Nothing came back, or word that the server as a whole cannot answer.
    Unavailable(String, Option<Duration>),
    /// The server answers, but not this.
    Refused(String, Option<Duration>),
}

impl Failure {
    pub(super) fn unavailable(reason: impl Into<String>) -> Self {
        Self::Unavailable(reason.into(), None)
    }

    pub(super) fn refused(reason: impl Into<String>) -> Self {
        Self::Refused(reason.into(), None)
    }

    pub(crate) fn reason(&self) -> &str {
        match self {
            Self::Expired => "The server answers 410 Gone",
            Self::Absent { reason, .. }
            | Self::Unavailable(reason, _)
            | Self::Refused(reason, _) => reason,
        }
    }
}

impl Server {
    pub(crate) fn new(api: Kubernetes) -> Self {
        Self {
            access: api.access,
            patience: api.patience,
            client: Mutex::default(),
            outage: RefCell::default(),
            returned: Notify::new(),
        }
    }

    pub(crate) fn patience(&self) -> Patience {
        self.patience
    }

    /// Sends a request. Credentials that are not accepted (401) are read anew, and the request is
    /// sent once more.
    pub(crate) async fn send(&self, ask: &Ask) -> Result<Response<Body>, Failure> {
        let (generation, client) = self.client(None).await?;
        let answer = self.attempt(&client, ask).await?;
        if answer.status() != StatusCode::UNAUTHORIZED {
            return self.judge(answer).await;
        }
        let (_, client) = self.client(Some(generation)).await?;
        let answer = self.attempt(&client, ask).await?;
        self.judge(answer).await
    }

    /// The client; another one than that of generation `refused`, which the server did not accept.
    async fn client(&self, refused: Option<u64>) -> Result<(u64, Client), Failure> {
        let mut credentials = self.client.lock().await;
        if let Some(client) = &credentials.client
            && refused != Some(credentials.generation)
        {
            return Ok((credentials.generation, client.clone()));
        }
        let client = self.access.connect().await;
        let client = client.map_err(Failure::unavailable)?;
        credentials.generation += 1;
        credentials.client = Some(client.clone());
        Ok((credentials.generation, client))
    }

    async fn attempt(&self, client: &Client, ask: &Ask) -> Result<Response<Body>, Failure> {
        let request = ask.build();
        let request = request.map_err(|error| Failure::refused(error.to_string()))?;
        let answer = timeout(self.limit(), client.send(request)).await;
        let answer = answer.map_err(|_| Failure::unavailable("The server does not answer"))?;
        answer.map_err(|error| Failure::unavailable(error.to_string()))
    }

    /// How long an answer may take to begin.
    fn limit(&self) -> Duration {
        let Patience { probe, answer, .. } = self.patience;
        match *self.outage.borrow() {
            None => answer,
            Some(outage) => (outage.since.elapsed() / ATTEMPT).clamp(probe.min(answer), answer),
        }
    }

    async fn judge(&self, answer: Response<Body>) -> Result<Response<Body>, Failure> {
        let (status, asked) = (answer.status(), retry_after(&answer));
        let is_away = matches!(
            status,
            StatusCode::BAD_GATEWAY | StatusCode::SERVICE_UNAVAILABLE | StatusCode::GATEWAY_TIMEOUT
        );
        if !is_away && self.outage.take().is_some() {
            self.returned.notify_waiters();
        }
        if status.is_success() {
            return Ok(answer);
        }
        let reason = refusal(answer, self.patience.probe).await;
        Err(match status {
            _ if is_away => Failure::Unavailable(reason, asked),
            StatusCode::GONE => Failure::Expired,
            StatusCode::NOT_FOUND | StatusCode::FORBIDDEN => Failure::Absent {
                forbidden: status == StatusCode::FORBIDDEN,
                reason,
            },
            _ => Failure::Refused(reason, asked),
        })
    }

    /// Waits until the caller's next attempt to reach the server is due. The caller has just seen
    /// that it is away.
    pub(crate) async fn wait(&self, asked: Option<Duration>) {
        let now = Instant::now();
        let asked = asked.unwrap_or_default();
        {
            let mut outage = self.outage.borrow_mut();
            let outage = outage.get_or_insert(Outage {
                since: now,
                next: now + jittered(self.patience.first),
            });
            outage.next = outage.next.max(now + asked);
        }
        sleep(asked).await;
        while let Some(next) = self.turn() {
            tokio::select! {
                () = sleep_until(next) => {}
                () = self.returned.notified() => {}
            }
        }
    }

    /// `None`: the next attempt is the caller's. Else when to ask again.
    fn turn(&self) -> Option<Instant> {
        let mut outage = self.outage.borrow_mut();
        let outage = outage.as_mut()?;
        let now = Instant::now();
        if now < outage.next {
            return Some(outage.next);
        }
        let Patience { first, most, .. } = self.patience;
        let pause = (now - outage.since) / PAUSE;
        outage.next = now + jittered(pause.clamp(first.min(most), most));
        None
    }

    /// Waits for this long, or until a server that was away is there again; in any case as long as
    /// the server asked for.
    pub(crate) async fn pause(&self, time: Duration, asked: Option<Duration>) {
        let end = Instant::now() + time;
        sleep(asked.unwrap_or_default()).await;
        tokio::select! {
            () = sleep_until(end) => {}
            () = self.returned.notified() => {}
        }
    }
}
