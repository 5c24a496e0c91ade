"""Makes the ONNX files of this folder and of tests/files, with the answers that tests compare.

    python3 -m venv venv && venv/bin/pip install numpy==2.4.6 scikit-learn==1.9.1 skl2onnx==1.20.0 \
        onnx==1.23.2 onnxruntime==1.32.0
    venv/bin/python models/make.py

Run in examples/foreign. The same versions give the same files.
"""

import gzip
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from skl2onnx import to_onnx
from skl2onnx.common.data_types import FloatTensorType
from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor
from sklearn.neural_network import MLPClassifier
from sklearn.preprocessing import StandardScaler

MODELS, FILES = Path("models"), Path("tests/files")
ROWS = 8  # rows of the answers that tests compare

table = np.loadtxt(gzip.open("../../flops-vit/data/digits.csv.gz"), delimiter=",")
pixels, labels = (table[:, :64] / 16).astype(np.float32), table[:, 64].astype(int)
is_test = np.arange(len(table)) % 5 == 0
train, test = (pixels[~is_test], labels[~is_test]), (pixels[is_test], labels[is_test])


def save(path, model, producer):
    model.producer_name, model.producer_version, model.doc_string = producer, "", ""
    model.graph.name = path.stem
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString(deterministic=True))
    print(f"{path}: {path.stat().st_size:,} bytes")


def answers(path, rows):
    """A line for each row: what it should give, by the library that trained it."""
    path.write_text("".join(",".join(f"{value:.9g}" for value in row) + "\n" for row in rows))


def outputs(path, rows):
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"input": rows})


def sklearn_onnx(path, model, features, **options):
    inputs = [("input", FloatTensorType([None, features]))]
    save(path, to_onnx(model, initial_types=inputs, options={id(model): options} if options else None), "skl2onnx")


def forest():
    # few trees: tract 0.23 walks through the leaves of all trees to find one
    model = RandomForestClassifier(n_estimators=10, max_depth=7, random_state=0).fit(*train)
    sklearn_onnx(MODELS / "forest.onnx", model, 64, zipmap=False)
    answers(MODELS / "forest.csv", model.predict_proba(test[0][:ROWS]))
    found = outputs(MODELS / "forest.onnx", test[0])[1]
    print(f"forest: test accuracy {np.mean(found.argmax(1) == test[1]):.4f},",
          f"largest difference to onnxruntime {np.abs(found - model.predict_proba(test[0])).max():.1e}")


def network():
    """Pixels are normalised in the graph; its layers are those of a scikit-learn network."""
    scaler = StandardScaler().fit(train[0])
    scale = np.maximum(scaler.scale_, 0.1)
    normalised = lambda x: (x - scaler.mean_) / scale
    model = MLPClassifier((48,), alpha=0.01, max_iter=200, random_state=0).fit(normalised(train[0]), train[1])
    floats = {"mean": scaler.mean_, "scale": scale}
    for i, (weight, bias) in enumerate(zip(model.coefs_, model.intercepts_), 1):
        floats |= {f"fc{i}.weight": weight.T, f"fc{i}.bias": bias}
    # all three spelled out, as PyTorch does; otherwise burn-onnx makes constants of the weights
    as_pytorch = {"alpha": 1.0, "beta": 1.0, "transB": 1}
    save(MODELS / "network.onnx", network_onnx(floats, as_pytorch), "make.py")
    logits = outputs(MODELS / "network.onnx", test[0])[0]
    answers(MODELS / "network.csv", logits[:ROWS])
    print(f"network: test accuracy {np.mean(logits.argmax(1) == test[1]):.4f},",
          f"{sum(value.size for value in floats.values()):,} values")
    few = {name: value[..., :2] if name == "fc1.weight" else value for name, value in floats.items()}
    few |= {"mean": scaler.mean_[:2], "scale": scale[:2]}
    save(FILES / "bare_gemm.onnx", network_onnx(few, {"transB": 1}), "make.py")


def network_onnx(floats, gemm):
    nodes = [
        helper.make_node("Sub", ["input", "mean"], ["centred"], "centre"),
        helper.make_node("Div", ["centred", "scale"], ["normalised"], "normalise"),
        helper.make_node("Gemm", ["normalised", "fc1.weight", "fc1.bias"], ["h"], "fc1", **gemm),
        helper.make_node("Relu", ["h"], ["relu"], "relu"),
        helper.make_node("Gemm", ["relu", "fc2.weight", "fc2.bias"], ["logits"], "fc2", **gemm),
    ]
    graph = helper.make_graph(
        nodes, "digits",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["rows", len(floats["mean"])])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["rows", 10])],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in floats.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def files_of_tests():
    small = (train[0][:, :5], train[1] % 2)
    tiny = RandomForestClassifier(n_estimators=2, max_depth=2, random_state=0).fit(*small)
    sklearn_onnx(FILES / "five_features.onnx", tiny, 5, zipmap=False)
    sklearn_onnx(FILES / "zipmap.onnx", tiny, 5)
    regressor = RandomForestRegressor(n_estimators=2, max_depth=2, random_state=0).fit(*train)
    sklearn_onnx(FILES / "regressor.onnx", regressor, 64)


FILES.mkdir(parents=True, exist_ok=True)
forest()
network()
files_of_tests()
