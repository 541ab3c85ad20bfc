//! What the host hears of what pods were told, through the session.

use crate::learning::{DENIED, SITE, asker, bench, name};
use sluice_appliance::session::{Facts, Session};
use sluice_appliance::testing::Bench;
use sluice_appliance::time::Duration;
use sluice_contract::message::Envelope;
use sluice_contract::name::Learnt;
use sluice_contract::{LinkId, Row, ToGuest, ToHost, VERSION, limits};

struct Host {
    session: Session,
    sequence: u32,
}

impl Host {
    fn new(bench: &mut Bench) -> Self {
        let session = Session::new(Facts::default());
        let mut host = Self {
            session,
            sequence: 0,
        };
        host.say(bench, ToGuest::Hello { version: VERSION });
        host
    }

    fn say(&mut self, bench: &mut Bench, message: ToGuest) -> Vec<ToHost> {
        let envelope = Envelope {
            session: 7,
            sequence: self.sequence,
            message,
        };
        self.sequence += 1;
        self.session.receive(&envelope, &mut bench.pipeline, 0);
        std::iter::from_fn(|| self.session.poll(&mut bench.pipeline))
            .map(|envelope| envelope.message)
            .collect()
    }

    /// All pages of an answer; only the last one says that it is.
    fn names(&mut self, bench: &mut Bench, token: u32, link: Option<u16>) -> Vec<Learnt> {
        let link = link.and_then(LinkId::new);
        let pages = self.say(bench, ToGuest::ReadNames { token, link });
        let count = pages.len();
        let mut all = Vec::new();
        for (n, page) in pages.into_iter().enumerate() {
            let (of, names, last) = match page {
                ToHost::Names { token, names, last } => (token, names, last),
                other => unreachable!("{other:?}"),
            };
            assert!(of == token && last == (n + 1 == count));
            assert!(names.len() <= limits::NAMES_BATCH);
            all.extend(names);
        }
        all
    }
}

#[test]
fn n14_the_host_is_told_what_each_pod_learnt_in_pages_and_until_when() {
    let mut bench = bench(&["example.com", "*.cdn.test"]);
    let mut host = Host::new(&mut bench);
    assert_eq!(host.names(&mut bench, 1, None), []);
    for (link, count) in [(16, 100u8), (17, 3)] {
        for n in 0..count {
            let pod = asker(link, 0);
            let to = format!("198.51.100.{n}");
            pod.resolve(&mut bench, n.into(), "example.com", &to, 60);
        }
    }
    asker(17, 1).resolve(&mut bench, 9, "a.cdn.test", SITE[1], 600);
    let of = |link: u16, text, address: &str, left| Learnt {
        link: LinkId::new(link).unwrap(),
        name: name(text),
        address: address.parse().unwrap(),
        left,
    };
    let first: Vec<_> = (0..100)
        .map(|n| of(16, "example.com", &format!("198.51.100.{n}"), 65))
        .collect();
    let mut second: Vec<_> = (0..3)
        .map(|n| of(17, "example.com", &format!("198.51.100.{n}"), 65))
        .collect();
    second.push(of(17, "*.cdn.test", SITE[1], 605));
    assert_eq!(host.names(&mut bench, 2, Some(16)), first);
    assert_eq!(host.names(&mut bench, 3, Some(17)), second);
    assert_eq!(host.names(&mut bench, 4, Some(18)), [], "a pod without");
    assert_eq!(host.names(&mut bench, 5, Some(4000)), [], "no pod");
    let all = [first, second].concat();
    assert_eq!(host.names(&mut bench, 6, None), all);

    // Later: what is over is told of a pod, and left out of what all know.
    bench.wait(Duration::from_secs(65 + 40));
    assert_eq!(
        asker(16, 0).connect(&mut bench, "198.51.100.1", 443),
        DENIED
    );
    let left: Vec<_> = host.names(&mut bench, 7, Some(17));
    let left: Vec<_> = left.iter().map(|it| it.left).collect();
    assert_eq!(left, [-40, -40, -40, 500]);
    let all = host.names(&mut bench, 8, None);
    assert_eq!(all, [of(17, "*.cdn.test", SITE[1], 500)]);

    // The link's next pod was told nothing.
    let mut row = sluice_appliance::testing::pod_row(17, 2);
    row.incarnation = 2;
    bench.commit(&[Row::Link(row)]);
    assert_eq!(host.names(&mut bench, 9, Some(17)), []);
    assert_eq!(host.names(&mut bench, 10, None), []);
}
