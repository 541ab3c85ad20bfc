use super::*;

fn target(number: u16) -> Target {
    let [high, low] = number.to_be_bytes();
    Target {
        address: [10, 0, high, low].into(),
        name: format!("node-{number}").into(),
        is_ours: true,
        ends: (
            [10, 244, 0, 0].into(),
            [10, high.wrapping_add(100), low, 0].into(),
        ),
        full: 1450,
    }
}

fn config(interval_ms: u32, per_second: u32) -> ProbeConfig {
    ProbeConfig {
        interval_ms,
        per_second,
    }
}

/// Goes on for so long; the answers come at once, from those for whom `passes` says so. What was sent and said.
fn go(
    paths: &mut Paths,
    now: &mut Instant,
    length: Duration,
    passes: impl Fn(IpAddr) -> bool,
) -> (Vec<(Instant, Send)>, Vec<Word>) {
    let end = *now + length;
    let (mut sent, mut said) = (Vec::new(), Vec::new());
    while *now < end {
        let (sends, words) = paths.turn(*now);
        said.extend(words);
        for send in sends {
            sent.push((*now, send));
            if passes(send.ends.1) {
                paths.answered(send.ends.1, send.sequence, send.size, *now);
            }
        }
        let next = paths.next(*now).unwrap();
        *now = next.max(*now + Duration::from_millis(1));
    }
    (sent, said)
}

#[test]
fn o22_many_peers_are_probed_within_the_budget_and_none_is_forgotten() {
    let mut now = Instant::now();
    let mut paths = Paths::new(config(5000, 200));
    let targets: Vec<Target> = (0..5000).map(target).collect();
    paths.retarget(&targets, now);
    let (sent, said) = go(&mut paths, &mut now, Duration::from_secs(120), |_| true);
    assert_eq!(said, []);
    let first = sent[0].0;
    for second in 0..120 {
        let from = first + Duration::from_secs(second);
        let within = sent
            .iter()
            .filter(|(at, _)| *at >= from && *at < from + Duration::from_secs(1));
        let count = within.count();
        assert!(
            (150..=225).contains(&count),
            "{count} packets in second {second}"
        );
    }
    let mut of: BTreeMap<IpAddr, usize> = BTreeMap::new();
    for (_, send) in &sent {
        *of.entry(send.ends.1).or_default() += 1;
    }
    assert_eq!(of.len(), 5000);
    assert!(
        of.values().all(|count| (4..=6).contains(count)),
        "a round every 50 s"
    );
    for target in &targets {
        assert_eq!(
            paths.report(target.address, now).state,
            ProbeState::Reachable
        );
    }
}

#[test]
fn t07_an_underlay_that_fails_costs_few_words_and_an_end_of_it_is_seen() {
    let mut now = Instant::now();
    let mut paths = Paths::new(config(1000, 1000));
    let targets: Vec<Target> = (0..100).map(target).collect();
    paths.retarget(&targets, now);
    go(&mut paths, &mut now, Duration::from_secs(10), |_| true);
    let (_, said) = go(&mut paths, &mut now, Duration::from_secs(50), |_| false);
    let bad = said.iter().filter(|it| matches!(it, Word::Bad(..))).count();
    assert_eq!(bad, 10, "{said:?}");
    let (_, said) = go(&mut paths, &mut now, Duration::from_secs(60), |_| false);
    assert_eq!(said, [Word::More(90)]);
    for target in &targets {
        let report = paths.report(target.address, now);
        assert_eq!(report.state, ProbeState::Unreachable);
    }
    go(&mut paths, &mut now, Duration::from_secs(5), |_| true);
    for target in &targets {
        let report = paths.report(target.address, now);
        assert_eq!(report.state, ProbeState::Reachable);
    }
}

#[test]
fn peers_that_come_and_go_leave_the_others_as_they_are() {
    let mut now = Instant::now();
    let mut paths = Paths::new(config(1000, 1000));
    let (a, b) = (target(1), target(2));
    paths.retarget(&[a.clone(), b.clone()], now);
    go(&mut paths, &mut now, Duration::from_secs(10), |_| true);
    let of = |paths: &Paths, target: &Target, now| paths.report(target.address, now);
    assert_eq!(of(&paths, &b, now).small.sent, 10);
    paths.retarget(std::slice::from_ref(&b), now);
    assert_eq!(of(&paths, &a, now).state, ProbeState::NotProbed);
    assert_eq!(of(&paths, &b, now).small.sent, 10);
    assert!(!paths.is_peer(a.ends.1) && paths.is_peer(b.ends.1));
    // An answer of one that is gone, and of one that was never asked.
    paths.answered(a.ends.1, 1, 128, now);
    paths.answered([192, 0, 2, 1].into(), 1, 128, now);
    // Another node has the address now.
    let other = Target {
        name: "other".into(),
        ..b.clone()
    };
    paths.retarget(&[other], now);
    assert_eq!(of(&paths, &b, now).state, ProbeState::NoAnswerYet);
}

#[test]
fn m03_the_limits_are_those_of_peers_to_whom_less_comes_through() {
    let mut now = Instant::now();
    let mut paths = Paths::new(config(200, 1000));
    paths.retarget(&[target(1), target(2)], now);
    let narrow = target(2).ends.1;
    let end = now + Duration::from_secs(30);
    while now < end {
        let (sends, _) = paths.turn(now);
        for send in sends {
            if send.ends.1 != narrow || send.size <= 1300 {
                paths.answered(send.ends.1, send.sequence, send.size, now);
            }
        }
        now += Duration::from_millis(5);
    }
    assert_eq!(paths.limits(), [(target(2).address, 1300)].into());
}
