use super::place::DEFAULT_PORT;
use super::*;
use std::thread;

fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

fn places(n: u32) -> Vec<Place> {
    let port = free_port();
    let host = "127.0.0.1".to_owned();
    let place = |rank| Place {
        rank,
        n,
        host: host.clone(),
        port,
    };
    (0..n).map(place).collect()
}

#[test]
fn sums_are_the_same_bits_on_every_rank_and_larger_than_a_bucket() {
    let length = BUCKET + 3;
    let value = |rank: u32, index: usize| (index % 1000) as f32 * 1e-3 + rank as f32;
    let run = move |place: Place| {
        let mut ranks = Ranks::meet(Some(&place), "run").unwrap();
        let mut values: Vec<f32> = (0..length).map(|index| value(place.rank, index)).collect();
        ranks.sum(&mut values).unwrap();
        let mut first = [place.rank as f32 + 5.0, -0.0];
        ranks.spread(&mut first).unwrap();
        assert_eq!(first.map(f32::to_bits), [5.0_f32, -0.0].map(f32::to_bits));
        (values, ranks.share(10))
    };
    let threads: Vec<_> = places(3)
        .into_iter()
        .map(|p| thread::spawn(move || run(p)))
        .collect();
    let found: Vec<_> = threads.into_iter().map(|t| t.join().unwrap()).collect();
    assert!(found.iter().all(|(values, _)| *values == found[0].0));
    for index in [0, 1, 999, BUCKET, BUCKET + 2] {
        let expected = 3.0 * (index % 1000) as f32 * 1e-3 + 3.0;
        assert!((found[0].0[index] - expected).abs() < 1e-5);
    }
    let shares: Vec<usize> = found.iter().flat_map(|(_, share)| share.clone()).collect();
    assert_eq!(shares, (0..10).collect::<Vec<_>>());
}

#[test]
fn a_lost_rank_is_named_on_every_other() {
    let run = |place: Place| {
        let mut ranks = Ranks::meet(Some(&place), "run").unwrap();
        if place.rank == 1 {
            return None;
        }
        let error = ranks.sum(&mut [1.0; 4]).unwrap_err();
        assert_eq!(crate::exit::code_of(&error), Exit::PeerDown);
        Some(error.to_string())
    };
    let threads: Vec<_> = places(3)
        .into_iter()
        .map(|p| thread::spawn(move || run(p)))
        .collect();
    let found: Vec<_> = threads.into_iter().map(|t| t.join().unwrap()).collect();
    assert_eq!(found[1], None);
    for message in [&found[0], &found[2]] {
        assert!(
            message.as_ref().unwrap().starts_with("rank 1 was lost"),
            "{message:?}"
        );
    }
}

#[test]
fn ranks_of_another_run_are_refused() {
    let [root, member] = <[Place; 2]>::try_from(places(2)).unwrap();
    let other = thread::spawn(move || Ranks::meet(Some(&member), "another run").is_err());
    let error = Ranks::meet(Some(&root), "run").unwrap_err();
    assert!(error.to_string().contains("another run"), "{error}");
    assert!(other.join().unwrap());
}

#[track_caller]
fn check(variables: &[(&str, &str)], expected: Option<(u32, u32, &str, u16)>) {
    let found = Place::from_environment(|name| {
        let found = variables.iter().find(|(known, _)| *known == name);
        found.map(|(_, value)| (*value).to_owned())
    });
    let expected = expected.map(|(rank, n, host, port)| Place {
        rank,
        n,
        host: host.into(),
        port,
    });
    assert_eq!(found.unwrap(), expected);
}

#[test]
fn launchers_are_understood() {
    check(&[], None);
    check(&[("RANK", "0"), ("WORLD_SIZE", "1")], None);
    let torchrun = [
        ("RANK", "3"),
        ("WORLD_SIZE", "4"),
        ("MASTER_ADDR", "a"),
        ("MASTER_PORT", "4000"),
    ];
    check(&torchrun, Some((3, 4, "a", 4000)));
    let mut agent = torchrun.to_vec();
    agent.push(("TORCHELASTIC_USE_AGENT_STORE", "True"));
    check(&agent, Some((3, 4, "a", 4001)));
    let batch_script = [("SLURM_PROCID", "0"), ("SLURM_NTASKS", "4")];
    check(&batch_script, None);
    let srun = [
        ("SLURM_PROCID", "1"),
        ("SLURM_STEP_NUM_TASKS", "2"),
        ("SLURM_LAUNCH_NODE_IPADDR", "10.0.0.1"),
    ];
    check(&srun, Some((1, 2, "10.0.0.1", DEFAULT_PORT)));
    let mpirun = [
        ("OMPI_COMM_WORLD_RANK", "1"),
        ("OMPI_COMM_WORLD_SIZE", "2"),
        ("OMPI_COMM_WORLD_LOCAL_SIZE", "2"),
    ];
    check(&mpirun, Some((1, 2, "127.0.0.1", DEFAULT_PORT)));
}

#[test]
fn wrong_variables_are_usage_errors() {
    for variables in [
        [("RANK", "2"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "a")],
        [("RANK", "x"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "a")],
        [("RANK", "1"), ("WORLD_SIZE", "2"), ("OTHER", "a")],
    ] {
        let error = Place::from_environment(|name| {
            let found = variables.iter().find(|(known, _)| *known == name);
            found.map(|(_, value)| (*value).to_owned())
        });
        assert_eq!(crate::exit::code_of(&error.unwrap_err()), Exit::Usage);
    }
}
