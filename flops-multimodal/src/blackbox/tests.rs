use burn::backend::Flex;
use burn::tensor::Tensor;

use super::protocol::{ScoreRequest, decode, encode};
use super::query::query_keys;
use super::testing::{info, queries, truths};
use super::{BlackBox, BlackBoxError, FromFn, InProcess, Info, Query};

#[test]
fn an_invalid_info_is_refused() {
    let sized = |image| Info::new(["a"], image).map(|info| info.image_len());
    assert_eq!(sized([3, 32, 32]), Ok(3072));
    assert_eq!(sized([3, 4096, 4096]), Ok(3 << 24));
    for image in [[0, 2, 2], [usize::MAX, 2, 2], [usize::MAX / 8, 1, 1], [5000, 1, 1], [1, 8193, 8192]] {
        assert!(matches!(sized(image), Err(BlackBoxError::Info { name: "image", .. })), "{image:?}");
    }
    let classes = |count| Info::new(vec!["a"; count], [1, 1, 1]).map(|info| info.classes.len());
    assert_eq!(classes(1 << 18), Ok(1 << 18));
    assert!(matches!(classes((1 << 18) + 1), Err(BlackBoxError::Info { name: "classes", .. })));
    assert!(info().with_context(77, 4096).is_ok());
    for [tokens, dim] in [[1 << 24, 2], [usize::MAX, 2], [1, usize::MAX]] {
        let refused = info().with_context(tokens, dim);
        assert!(matches!(refused, Err(BlackBoxError::Info { name: "context", .. })), "{tokens} × {dim}");
    }
    assert!(Info::new(Vec::<String>::new(), [1, 1, 1]).is_err());
    assert!(info().with_context(0, 3).is_err() && info().with_context(3, 0).is_err());
    let unchecked = Info { classes: vec![], ..info() };
    assert!(FromFn::new(unchecked, |_: &[Query]| Ok::<_, String>(vec![])).is_err());
}

#[test]
fn different_black_boxes_have_different_fingerprints() {
    let of = |classes: &[&str], image| Info::new(classes.to_vec(), image).unwrap().fingerprint();
    let base = of(&["ab", "c"], [1, 2, 2]);
    assert_eq!(base, of(&["ab", "c"], [1, 2, 2]));
    assert_ne!(base, of(&["a", "bc"], [1, 2, 2]));
    assert_ne!(base, of(&["ab", "c"], [2, 1, 2]));
    assert_ne!(base, Info::new(["ab", "c"], [1, 2, 2]).unwrap().with_context(1, 1).unwrap().fingerprint());
}

#[test]
fn a_key_depends_on_the_bits_alone() {
    let image = vec![0.5, 0.25];
    let query = Query::new(image.clone());
    // fixed, because journals rely on it; in Python, with h = lambda b: hashlib.sha256(b).digest():
    // h(b"flops query\0" + h(b"image\0" + struct.pack("<2f", 0.5, 0.25)))[:16].hex()
    assert_eq!(query.key().to_string(), "d7d6cd628814e251bac54c1e83f4c698");
    assert_eq!(query.key(), Query::new(image.clone()).key());
    assert_eq!(query.key().to_string().parse(), Ok(query.key()));
    for text in ["", "7", "+7d6cd628814e251bac54c1e83f4c698", "d7d6cd628814e251bac54c1e83f4c6980"] {
        assert!(text.parse::<super::Key>().is_err(), "{text}");
    }
    let others = [
        query.clone().with_context(vec![0.0]),
        query.clone().with_context(vec![-0.0]),
        Query::new(vec![0.25, 0.5]),
        Query::new(vec![0.5]).with_context(vec![0.25]),
    ];
    let mut all = query_keys(&others);
    all.push(query.key());
    all.sort();
    all.dedup();
    assert_eq!(all.len(), 5);
}

#[test]
fn requests_keep_every_bit_and_send_a_shared_image_once() {
    let values = [0.1, -0.0, f32::MIN_POSITIVE / 8.0, f32::MAX, f32::NAN];
    let back = decode(&encode(&values)).unwrap();
    assert!(values.iter().zip(&back).all(|(left, right)| left.to_bits() == right.to_bits()));
    assert_eq!(encode(&[1.0]), "AACAPw==");
    assert!(decode("AACA").unwrap_err().contains("3 bytes"));
    assert!(decode("?").unwrap_err().contains("base64"));

    let queries = queries(6);
    let request = ScoreRequest::new(&queries);
    assert_eq!((request.rows(), request.images.len()), (6, 4));
    let json = serde_json::to_string(&request).unwrap();
    assert_eq!(serde_json::from_str::<ScoreRequest>(&json).unwrap().queries(&info()).unwrap(), queries);
    let plain = ScoreRequest::new(&queries[..1]);
    assert_eq!(serde_json::to_string(&plain).unwrap(), format!(r#"{{"images":["{}"]}}"#, plain.images[0]));
}

#[test]
fn an_invalid_request_is_refused() {
    let good = ScoreRequest::new(&queries(4));
    let refused = |change: &dyn Fn(&mut ScoreRequest)| {
        let mut request = good.clone();
        change(&mut request);
        request.queries(&info()).unwrap_err().to_string()
    };
    assert!(refused(&|r| r.image_of.as_mut().unwrap()[2] = 9).contains("image_of[2]: 9 but there are 3"));
    assert!(refused(&|r| r.contexts.as_mut().unwrap().truncate(3)).contains("3 entries for 4 rows"));
    assert!(refused(&|r| r.images[1] = "!".into()).contains("images[1]: not base64"));
    assert!(refused(&|r| r.images[0] = encode(&[0.0; 5])).contains("query 0: image has 5 values where 4"));
    assert!(refused(&|r| r.images[0] = encode(&[f32::NAN; 4])).contains("query 0: image[0] = NaN"));
    assert!(refused(&|r| r.contexts.as_mut().unwrap()[1] = encode(&[0.0; 3])).contains("2 × 1 to 3"));
    assert!(refused(&|r| r.contexts.as_mut().unwrap()[1] = encode(&[f32::INFINITY; 2])).contains("context[0] = inf"));
}

#[test]
fn queries_and_answers_of_a_closure_are_checked() {
    let with = |scores: Result<Vec<Vec<f32>>, &'static str>| {
        let closure = FromFn::new(info(), move |_: &[Query]| scores.clone()).unwrap();
        closure.scores(&queries(2))
    };
    assert_eq!(with(Ok(vec![vec![1.0, 2.0]; 2])), Ok(vec![vec![1.0, 2.0]; 2]));
    assert_eq!(with(Ok(vec![vec![1.0, 2.0]])), Err(BlackBoxError::Rows { got: 1, expected: 2 }));
    let short = Ok(vec![vec![1.0, 2.0], vec![1.0]]);
    assert_eq!(with(short), Err(BlackBoxError::Classes { row: 1, got: 1, expected: 2 }));
    let infinite = Ok(vec![vec![1.0, f32::INFINITY], vec![1.0, 2.0]]);
    assert_eq!(with(infinite), Err(BlackBoxError::Score { row: 0, class: 1, value: f32::INFINITY }));
    assert!(matches!(with(Ok(vec![vec![f32::NAN; 2]; 2])), Err(BlackBoxError::Score { row: 0, class: 0, .. })));
    assert_eq!(with(Err("no quota")), Err(BlackBoxError::Failed("no quota".into())));

    let never = FromFn::new(info(), |_: &[Query]| Err::<Vec<Vec<f32>>, _>("sent")).unwrap();
    let bright = [Query::new(vec![0.0, 0.0, 1.5, 0.0])];
    assert!(matches!(never.scores(&bright), Err(BlackBoxError::QueryValue { what: "image", index: 2, .. })));
    assert_eq!(never.scores(&[]), Ok(vec![]));
    let plain =
        FromFn::new(Info::new(["a"], [1, 1, 1]).unwrap(), |_: &[Query]| Err::<_, String>("sent".into())).unwrap();
    let context = [Query::new(vec![0.0]).with_context(vec![0.0])];
    assert!(plain.scores(&context).unwrap_err().to_string().contains("takes no context"));
}

#[test]
fn each_forward_pass_in_process_has_one_context_length() {
    let sizes = std::sync::Mutex::new(Vec::new());
    let forward = |images: Tensor<Flex, 4>, contexts: Option<Tensor<Flex, 3>>| {
        let tokens = contexts.as_ref().map_or(0, |contexts| contexts.dims()[1]);
        sizes.lock().unwrap().push((images.dims()[0], tokens));
        let sum = images.flatten::<2>(1, 3).sum_dim(1);
        let sum = match contexts {
            Some(contexts) => sum + contexts.flatten::<2>(1, 2).sum_dim(1),
            None => sum,
        };
        Tensor::cat(vec![sum.clone(), -sum + 0.1], 1)
    };
    let model = InProcess::new(info(), forward, 2, &Default::default()).unwrap();
    let mut queries = queries(4);
    queries.sort_by_key(|query| query.context.as_ref().map(|context| context.len()));
    queries.push(queries[3].clone());
    queries.push(queries[3].clone());
    let (got, expected) = (model.scores(&queries).unwrap(), truths(&queries));
    for (got, expected) in got.iter().flatten().zip(expected.iter().flatten()) {
        assert!((got - expected).abs() < 1e-5, "{got} {expected}");
    }
    // no context, 1 token and 2 tokens, in passes of at most 2 rows
    assert_eq!(*sizes.lock().unwrap(), [(2, 0), (1, 1), (2, 2), (1, 2)]);

    let wrong = |images: Tensor<Flex, 4>, _| images.flatten::<2>(1, 3);
    let model = InProcess::<Flex, _>::new(info(), wrong, 2, &Default::default()).unwrap();
    assert_eq!(model.scores(&queries), Err(BlackBoxError::Classes { row: 0, got: 4, expected: 2 }));
    assert!(InProcess::<Flex, _>::new(info(), wrong, 0, &Default::default()).is_err());
}
