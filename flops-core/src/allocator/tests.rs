use burn::backend::{Autodiff, Flex};
use burn::module::{AutodiffModule, Module, Param};
use burn::prelude::*;
use burn::record::{DefaultRecorder, Recorder};
use burn::tensor::backend::AutodiffBackend;
use rand::{Rng, SeedableRng, rngs::StdRng};

use super::*;
use crate::error::Error;

type Diff = Autodiff<Flex>;

/// Parameterisations of the mean that need no features of the user's own.
const MEANS: [MeanModel; 3] = [MeanModel::Loss, MeanModel::Variance, MeanModel::Ranks(16)];

fn budget() -> QueryBudget {
    QueryBudget::new(20, 1).unwrap()
}

/// Losses as training leaves them, √(Tr Σ) affine in the loss, and embeddings in 3 clusters with
/// duplicates.
struct Fixture {
    losses: Vec<f64>,
    variances: Vec<f64>,
    embeddings: Vec<f32>,
    /// Measurements that the variances do not foretell.
    moments: Vec<f64>,
}

impl Fixture {
    const DIM: usize = 4;

    fn new(n: usize) -> Self {
        let mut rng = StdRng::seed_from_u64(n as u64);
        let mut uniform = || (rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
        let losses: Vec<f64> = (0..n).map(|_| 0.05 - 0.7 * uniform().max(1e-9).ln()).collect();
        let variances = losses.iter().map(|l| (0.1 + l) * (0.1 + l)).collect();
        let embeddings = (0..n * Self::DIM).map(|k| ((k / Self::DIM % 3 + 1) * (k % Self::DIM)) as f32 % 5.0).collect();
        let moments =
            losses.iter().enumerate().map(|(j, l)| if j % 5 == 0 { f64::NAN } else { 1.0 / (0.1 + l) }).collect();
        Self { losses, variances, embeddings, moments }
    }

    fn shown(&self) -> Shown<'_> {
        Shown::new(&self.moments)
    }

    fn features(&self) -> DatumFeatures<'_> {
        let embeddings = Some(Embeddings::new(&self.embeddings, Self::DIM).unwrap());
        DatumFeatures { losses: &self.losses, variances: &self.variances, embeddings, ..Default::default() }
    }
}

/// A module that holds an allocator, like a learner.
#[derive(Module, Debug)]
struct Holder<B: Backend, A> {
    weight: Param<Tensor<B, 1>>,
    allocator: A,
}

/// An allocator made by name has that name; uniform shares are those of one kind alone.
#[test]
fn allocators_have_the_names_of_their_kinds() {
    for kind in AllocatorKind::ALL {
        let allocator = AnyAllocator::<Flex>::new(kind, &Default::default()).unwrap();
        assert_eq!(allocator.name(), kind.to_string());
        let uniform = kind == AllocatorKind::Uniform;
        assert_eq!((kind.is_uniform(), allocator.is_uniform()), (uniform, uniform), "{kind}");
    }
    // the paper's form is both of its settings
    let of = |config: GaussianAllocatorConfig| config.init::<Flex>(&Default::default()).unwrap().name();
    assert_eq!(of(GaussianAllocatorConfig::new().with_mean(MeanModel::Loss)), "gaussian");
    assert_eq!(of(GaussianAllocatorConfig::new().with_draws(true)), "gaussian");
}

/// The contract that every allocator keeps.
fn contract<A, P>(make: impl Fn() -> A)
where
    A: Allocator<Diff> + AutodiffModule<Diff, InnerModule = P>,
    P: Allocator<<Diff as AutodiffBackend>::InnerBackend, Update = A::Update>,
{
    let fixture = Fixture::new(37);
    let features = fixture.features();
    let rng = || StdRng::seed_from_u64(5);
    let met = |a: &Allocation, n: usize, b: &QueryBudget| {
        assert_eq!(a.counts().len(), n);
        assert_eq!(a.total(), b.total(n));
        assert!(a.min() >= b.min_per_datum(), "{a:?}");
    };

    // every budget is met, also after learning
    for (queries, min) in [(1, 1), (3, 1), (7, 7), (20, 2), (21, 1)] {
        let b = QueryBudget::new(queries, min).unwrap();
        let mut allocator = make();
        let mut rng = rng();
        for _ in 0..5 {
            let (a, update) = allocator.allocate(&features, &b, &mut rng).unwrap();
            met(&a, 37, &b);
            allocator = allocator.apply(update, &fixture.shown());
        }
    }

    // degenerate batches get a valid allocation
    let zeros = [0.0; 6];
    let cases = [
        (&fixture.losses[..1], &fixture.variances[..1]),
        (&zeros[..], &fixture.variances[..6]),
        (&fixture.losses[..6], &zeros[..]),
        (&[f64::MAX, f64::MIN, 0.0], &[1e300, 0.0, 1e-300]),
    ];
    for (losses, variances) in cases {
        let features = DatumFeatures { losses, variances, ..Default::default() };
        let (a, update) = make().allocate(&features, &budget(), &mut rng()).unwrap();
        met(&a, losses.len(), &budget());
        // whatever the queries showed, the allocator goes on
        let (n, extreme) = (losses.len(), [f64::MAX, 1e-300, 0.0, f64::NAN, f64::INFINITY, 1.0]);
        for moments in [variances, &vec![f64::NAN; n], &vec![0.0; n], &extreme.repeat(n)[..n], &[1.0], &[]] {
            let after = make().apply(update.clone(), &Shown::new(moments));
            met(&after.allocate(&features, &budget(), &mut rng()).unwrap().0, n, &budget());
        }
    }
    let same = vec![1.0; 8 * Fixture::DIM];
    let embeddings = Some(Embeddings::new(&same, Fixture::DIM).unwrap());
    let (losses, variances) = (&fixture.losses[..8], &fixture.variances[..8]);
    let features = DatumFeatures { losses, variances, embeddings, ..Default::default() };
    met(&make().allocate(&features, &budget(), &mut rng()).unwrap().0, 8, &budget());

    // unusable features are errors that name the value
    let failure = |losses: &[f64], variances: &[f64]| {
        let features = DatumFeatures { losses, variances, ..Default::default() };
        make().allocate(&features, &budget(), &mut rng()).unwrap_err().to_string()
    };
    assert!(failure(&[], &[]).contains("0 examples"));
    assert!(failure(&[1.0, f64::NAN], &[1.0, 1.0]).contains("losses[1] = NaN"));
    assert!(failure(&[1.0, 1.0], &[1.0, -1.0]).contains("variances[1] = -1"));
    assert!(failure(&[1.0, 1.0], &[1.0]).contains("variances has 1 entries where 2"));

    // equal generator states give equal allocations, also on the inner module
    let features = fixture.features();
    let run = |a: &A| a.allocate(&features, &budget(), &mut rng()).unwrap().0;
    let mut allocator = make();
    assert_eq!(run(&allocator), run(&make()));
    assert_eq!(run(&allocator), allocator.valid().allocate(&features, &budget(), &mut rng()).unwrap().0);

    // a checkpoint holds all that was learned: the next two allocations equal the original's
    let mut learning = rng();
    for _ in 0..10 {
        let update = allocator.allocate(&features, &budget(), &mut learning).unwrap().1;
        // the update and the measurements decide, and nothing else
        let again = allocator.clone().apply(update.clone(), &fixture.shown());
        allocator = allocator.apply(update, &fixture.shown());
        assert_eq!(run(&again), run(&allocator));
    }
    let device = Default::default();
    let holder = |allocator| Holder { weight: Param::from_tensor(Tensor::<Diff, 1>::zeros([1], &device)), allocator };
    assert_eq!(holder(allocator.clone()).valid().allocator.name(), allocator.name());
    let folder = tempfile::tempdir().unwrap();
    let (path, recorder) = (folder.path().join("learner"), DefaultRecorder::new());
    recorder.record(holder(allocator.clone()).into_record(), path.clone()).unwrap();
    let mut restored = holder(make()).load_record(recorder.load(path, &device).unwrap()).allocator;
    for _ in 0..2 {
        let (a, update) = allocator.allocate(&features, &budget(), &mut rng()).unwrap();
        let (b, same) = restored.allocate(&features, &budget(), &mut rng()).unwrap();
        assert_eq!(a, b);
        assert_eq!(format!("{update:?}"), format!("{same:?}"));
        (allocator, restored) = (allocator.apply(update, &fixture.shown()), restored.apply(same, &fixture.shown()));
    }
}

fn any(name: &str) -> AnyAllocator<Diff> {
    AnyAllocator::from_name(name, &Default::default()).unwrap()
}

#[test]
fn uniform_keeps_the_contract() {
    contract(|| Uniform);
}

#[test]
fn neyman_keeps_the_contract() {
    contract(|| Neyman);
}

#[test]
fn gaussian_keeps_the_contract() {
    for mean in MEANS {
        // an exact covariance and one of low rank
        for exact_up_to in [1024, 4] {
            let config = GaussianAllocatorConfig::new().with_mean(mean).with_exact_up_to(exact_up_to);
            contract(|| config.init::<Diff>(&Default::default()).unwrap());
        }
    }
}

#[test]
fn bernoulli_keeps_the_contract() {
    for mean in MEANS {
        let config = BernoulliAllocatorConfig::new().with_mean(mean);
        contract(|| config.init::<Diff>(&Default::default()).unwrap());
    }
}

#[test]
fn any_keeps_the_contract() {
    for kind in AllocatorKind::ALL {
        assert_eq!(any(kind.name()).name(), kind.name());
        contract(|| any(kind.name()));
    }
    let message = AnyAllocator::<Flex>::from_name("best", &Default::default()).unwrap_err().to_string();
    assert!(message.contains("'best'") && message.contains("bernoulli, gaussian-paper"), "{message}");
}

/// Burn loads a parameter of any shape. That of another mean is noticed when it is used.
#[test]
fn the_record_of_another_mean_is_an_error() {
    let fixture = Fixture::new(5);
    let make = |kind| AnyAllocator::<Flex>::new(kind, &Default::default()).unwrap();
    let mixed = make(AllocatorKind::GaussianPaper).load_record(make(AllocatorKind::Gaussian).into_record());
    let outcome = mixed.allocate(&fixture.features(), &budget(), &mut StdRng::seed_from_u64(0));
    assert_eq!(outcome.err(), Some(Error::Length { name: "the allocator's β", got: 3, expected: 2 }));
}

#[test]
fn only_uniform_allocators_say_that_they_are() {
    for kind in AllocatorKind::ALL {
        assert_eq!(any(kind.name()).is_uniform(), kind == AllocatorKind::Uniform, "{kind}");
    }
}

/// A learned allocator learns from the measurements: after 30 steps it follows them, not the
/// estimates. The others are the same as before.
#[test]
fn learned_allocators_follow_what_was_shown() {
    let fixture = Fixture::new(37);
    let falling: Vec<f64> = fixture.losses.iter().map(|l| (0.1 + l).powi(-2)).collect();
    for kind in AllocatorKind::ALL {
        let j = |moments: &[f64]| {
            let (mut allocator, mut rng) = (any(kind.name()), StdRng::seed_from_u64(3));
            for _ in 0..30 {
                let update = allocator.allocate(&fixture.features(), &budget(), &mut rng).unwrap().1;
                allocator = allocator.apply(update, &Shown::new(moments));
            }
            let allocation = allocator.allocate(&fixture.features(), &budget(), &mut rng).unwrap().0;
            variance_objective(&falling, &allocation)
        };
        let learns = !matches!(kind, AllocatorKind::Uniform | AllocatorKind::Neyman);
        let (by_measurements, by_estimates) = (j(&falling), j(&fixture.variances));
        assert_eq!(by_measurements < 0.9 * by_estimates, learns, "{kind}: {by_measurements} {by_estimates}");
    }
}

/// A record of another mean that comes between step and update changes nothing, and does not panic.
#[test]
fn an_update_of_another_mean_is_left_out() {
    let fixture = Fixture::new(5);
    let make = |kind| AnyAllocator::<Flex>::new(kind, &Default::default()).unwrap();
    let update = make(AllocatorKind::GaussianPaper)
        .allocate(&fixture.features(), &budget(), &mut StdRng::seed_from_u64(0))
        .unwrap()
        .1;
    let mixed = make(AllocatorKind::GaussianPaper).load_record(make(AllocatorKind::Gaussian).into_record());
    let lambda = |a: &AnyAllocator<Flex>| crate::testing::weights(a);
    assert_eq!(lambda(&mixed.clone().apply(update, &fixture.shown())), lambda(&mixed));
    // the allocator itself may have been replaced between the step and its update
    let learned = [AllocatorKind::Gaussian, AllocatorKind::GaussianPaper, AllocatorKind::Bernoulli];
    for (before, after) in learned.iter().flat_map(|a| learned.map(|b| (*a, b))) {
        let (_, update) = make(before).allocate(&fixture.features(), &budget(), &mut StdRng::seed_from_u64(0)).unwrap();
        let learns = lambda(&make(after).apply(update, &fixture.shown())) != lambda(&make(after));
        // these two have the same mean, and a Bernoulli allocator needs no covariance
        let same_mean = (before, after) == (AllocatorKind::GaussianPaper, AllocatorKind::Bernoulli);
        assert_eq!(learns, before == after || same_mean, "{before}, then {after}");
    }
}

/// Deterministic. With A₀ = 20, integers and A_min add less than 10 % to the floor 1/(1 + CV²).
#[test]
fn neyman_reaches_the_floor() {
    for n in [32, 64, 128, 512] {
        let fixture = Fixture::new(n);
        let weights: Vec<f64> = fixture.variances.iter().map(|v| v.sqrt()).collect();
        let allocation = Allocation::neyman(&weights, &budget()).unwrap();
        let report = AllocationReport::new(&fixture.variances, &allocation, &budget()).unwrap();
        assert!(report.cv > 0.6 && report.relative_variance >= report.floor * (1.0 - 1e-12), "{report:?}");
        assert!(report.relative_variance < 1.1 * report.floor, "{report:?}");
        assert_eq!(report.relative_variance, report.neyman_relative_variance);
        assert_eq!((report.min, report.max), (allocation.min(), allocation.max()));
    }
}
