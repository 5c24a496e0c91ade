//! The black box: a server of our own or another one, or a model in this process.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use burn::prelude::*;
use flops_examples::backend::{B, Device};
use flops_examples::blackbox::server_process::ServerProcess;
use flops_examples::run::artifacts::Artifacts;
use flops_multimodal::BlackBoxClient;
use flops_multimodal::blackbox::{BlackBox, BlackBoxError, HttpBlackBox, HttpConfig, InProcess, Metered};
use flops_multimodal::data::scenes::SIDE;

use crate::args::{Args, Plan};

/// The answers of the black box.
pub const JOURNAL: &str = "answers.journal";
/// The tuned prompt.
pub const PROMPT: &str = "prompt.safetensors";
/// The charge log of the program's own server.
const CHARGES: &str = "server.charges";

/// The black box, behind the cap on its queries and the journal of its answers.
pub struct Endpoint {
    pub metered: Arc<Metered<Box<dyn BlackBox>>>,
    /// What the prompts ask: all clones share the first failure.
    pub client: BlackBoxClient,
    /// The client, which can ask for the server's own count.
    pub http: Option<Arc<HttpBlackBox>>,
    /// Stopped when this value is dropped.
    _server: Option<ServerProcess>,
}

impl Endpoint {
    /// Opens the black box that the flags choose.
    ///
    /// # Errors
    /// Where it cannot be reached, has other classes or sizes than the images, or more is spent
    /// than the cap.
    pub fn open(args: &Args, plan: &Plan, artifacts: &Artifacts, device: &Device) -> Result<Self> {
        let metered = |inner: Box<dyn BlackBox>| -> Result<Arc<Metered<Box<dyn BlackBox>>>> {
            let metered = Metered::new(inner, plan.budget.cap).with_charge(args.charge());
            let metered = metered.with_journal(artifacts.path(JOURNAL))?;
            let (cap, spent) = (metered.cap(), metered.spent());
            ensure!(spent <= cap, "--cap {cap}: the run has spent {spent} queries already; give at least as many");
            metered.hold_back(plan.budget.held_back());
            Ok(Arc::new(metered))
        };
        let (metered, http, server) = if args.local {
            (metered(Box::new(in_process(args, device)?))?, None, None)
        } else {
            let (address, server) = match &args.endpoint {
                Some(address) => (address.clone(), None),
                None => {
                    let server = ServerProcess::start(&args.classifier, &artifacts.path(CHARGES))?;
                    (server.address.clone(), Some(server))
                }
            };
            let http = connect(args, address)?;
            (metered(Box::new(http.clone()))?, Some(http), server)
        };
        let client = BlackBoxClient::new(metered.clone());
        Ok(Self { metered, client, http, _server: server })
    }

    /// Returns whether a query was refused because the rest of the cap is held back.
    pub fn is_held_back(&self) -> bool {
        matches!(self.client.failure(), Some(BlackBoxError::HeldBack { .. }))
    }

    /// Frees what is held back, for the last evaluation.
    pub fn release(&self) {
        self.metered.release();
        if self.is_held_back() {
            self.client.forget_failure();
        }
    }
}

/// Connects to a server, which must have the classes and the sizes of the images.
///
/// # Errors
/// Where it cannot be reached, or has others.
pub fn connect(args: &Args, address: String) -> Result<Arc<HttpBlackBox>> {
    let http = HttpConfig::new(address).with_concurrency(args.concurrency).with_retries(30);
    let http = http.with_backoff(Duration::from_millis(250), Duration::from_secs(2));
    let http = HttpBlackBox::connect(http)?;
    let (info, classes) = (http.info(), args.classifier.classes);
    ensure!(
        info.classes == classes.names(),
        "the endpoint scores {} classes ({:.80}, …), the images are labelled by {}; choose the classes it has with \
         --classes",
        info.classes.len(),
        info.classes.first().map_or("", String::as_str),
        classes.name()
    );
    let image = [3, SIDE, SIDE];
    ensure!(info.image == image, "the endpoint takes images of shape {:?}, the scenes have {image:?}", info.image);
    Ok(Arc::new(http))
}

/// Returns the classifier as a black box in this process.
fn in_process(args: &Args, device: &Device) -> Result<impl BlackBox + use<>> {
    let classifier = args.classifier.classifier::<B>(device)?;
    let info = classifier.info().clone();
    let (classes, fallback) = (info.classes.len(), device.clone());
    let forward = move |images: Tensor<B, 4>, contexts: Option<Tensor<B, 3>>| {
        let rows = images.dims()[0];
        let scores = classifier.scores(classifier.embed_images(images), contexts);
        // an error becomes NaN, which the black box rejects
        scores.unwrap_or_else(|_| Tensor::full([rows, classes], f32::NAN, &fallback))
    };
    Ok(InProcess::<B, _>::new(info, forward, 64, device)?)
}

/// Renames what an earlier run in the folder paid for: its answers, its settings and its prompt.
/// They are never deleted.
pub fn set_aside(artifacts: &Artifacts) -> Result<()> {
    if [JOURNAL, CHARGES].iter().all(|name| !artifacts.path(name).exists()) {
        return Ok(());
    }
    // a run without settings is not resumed: a kill in between leaves no journal to other settings
    let names = ["config.json", PROMPT, CHARGES, JOURNAL];
    let free = (1..).find(|n| names.iter().all(|name| !artifacts.path(&format!("{name}.{n}")).exists())).unwrap_or(0);
    for name in names.iter().filter(|name| artifacts.path(name).exists()) {
        let (from, to) = (artifacts.path(name), artifacts.path(&format!("{name}.{free}")));
        std::fs::rename(&from, &to).with_context(|| format!("cannot rename {} to {}", from.display(), to.display()))?;
    }
    println!("the answers of the earlier run are kept as {JOURNAL}.{free}");
    Ok(())
}
