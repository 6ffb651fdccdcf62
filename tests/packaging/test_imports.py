"""Imports run one way, start nothing, and need neither Triton nor a peer package."""

import ast
import json

# What a layer may import of this project; everything above the first three may import anything but
# what is above itself.
LAYERS = {
    "fmkernels._library": ["fmkernels._C", "fmkernels._build_info"],
    "fmkernels._autocast": [],
    "fmkernels._checks": [],
    "fmkernels._tuned": [],
    "fmkernels.ops": [
        "fmkernels._library",
        "fmkernels._autocast",
        "fmkernels._checks",
        "fmkernels._tuned",
        "fmkernels._cuda",
        "fmkernels.ops",
    ],
    "fmkernels.api": ["fmkernels"],
    "fmkernels.demo": ["fmkernels"],  # an application of the library
    "fmkernels": ["fmkernels"],
}
MAY_USE_TORCH_LIBRARY = ("fmkernels._library", "fmkernels.testing")  # the latter for opcheck
DEVICE_WORDS = ("is_cuda", "is_cpu", "is_mps", "device.type")

IMPORT = """
import json, socket, sys, time
import numpy, torch

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Refuse())
events = []
watched = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect")
sys.addaudithook(lambda event, args: events.append(event) if event in watched else None)
before, start = set(sys.modules), time.process_time()
import fmkernels, fmkernels.api
seconds = time.process_time() - start
new = sorted({name.partition(".")[0] for name in set(sys.modules) - before})
fmkernels.soft_sort(torch.rand(4))
print(json.dumps({"events": events, "seconds": seconds, "new": new}))
"""


def modules(root):
    """(dotted name, syntax tree) of every file of both packages."""
    for folder, package in (("fmkernels", "fmkernels"), ("python_api", "fmkernels.api")):
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root / folder).with_suffix("").parts
            name = ".".join((package, *(part for part in parts if part != "__init__")))
            yield name, ast.parse(path.read_text(), str(path)), path.name == "__init__.py"


def imported(name, tree, is_package):
    """Dotted names that a module imports, relative ones resolved."""
    package = name if is_package else name.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                base = ".".join([*parents[: len(parents) - node.level + 1], base]).rstrip(".")
            yield from (f"{base}.{alias.name}" for alias in node.names)


def dotted(tree):
    """Every attribute chain in the code, such as ``torch.library.Library``."""
    return {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


def within(name, prefixes):
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def test_layers_import_one_way(root):
    for name, tree, is_package in modules(root):
        layer = next(prefix for prefix in LAYERS if within(name, [prefix]))
        ours = {found for found in imported(name, tree, is_package) if within(found, ["fmkernels"])}
        wrong = {found for found in ours if not within(found, LAYERS[layer])}
        if layer == "fmkernels":
            wrong |= {found for found in ours if within(found, ["fmkernels.api"])}
        assert not wrong, f"{name} imports {sorted(wrong)}"


def test_the_binary_and_torch_library_have_one_door(root):
    for name, tree, is_package in modules(root):
        used = {*dotted(tree), *imported(name, tree, is_package)}
        if name not in MAY_USE_TORCH_LIBRARY:
            assert not {found for found in used if within(found, ["torch.library"])}, name
        if name != "fmkernels._library":
            assert not {found for found in used if within(found, ["fmkernels._C"])}, name


def test_functions_know_no_module_and_modules_know_no_kernel(root):
    for name, tree, is_package in modules(root):
        used = {*dotted(tree), *imported(name, tree, is_package)}
        if within(name, ["fmkernels.demo"]):  # an application of the library
            continue
        if not within(name, ["fmkernels.api"]):
            assert not {found for found in used if found.endswith("nn.Module")}, name
            continue
        kernels = ["triton", "torch.cuda", "torch.ops", "fmkernels._library"]
        assert not {found for found in used if within(found, kernels)}, name
        assert not {found for found in used if found.endswith(DEVICE_WORDS)}, name


def test_import_starts_nothing_and_needs_nothing_else(built, run_python):
    facts = json.loads(run_python("-c", IMPORT, path=built.installed).stdout.splitlines()[-1])
    assert facts["events"] == []
    assert facts["seconds"] < 1.0
    optional = {
        "triton",
        "diffsort",
        "scipy",
        "sklearn",
        "matplotlib",
        "faiss",
        "safetensors",
        "tqdm",
    }
    assert not optional & set(facts["new"])
