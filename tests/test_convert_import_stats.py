import io
import json
import multiprocessing
import pickle
import pickletools
import resource
import struct
import sys

import numpy as np
import pytest
from conftest import SHARED
from hypothesis import given, settings
from hypothesis import strategies as st

from lerobot_vla0.convert.import_stats import MAX_FILE, read_stats

GOOD = {"out_ori_act": {"min": np.array([-0.9375, -1.0]), "max": np.array([0.375, 1.0], np.float32)}}
REAL = sorted(SHARED.glob("peer_layouts/*/dataset_stats.pkl"))


@pytest.mark.parametrize("name", ["eval", "getattr", "__import__"])
def test_pickle_gets_no_builtin_function(name, tmp_path):
    (tmp_path / "stats.pkl").write_bytes(f"cbuiltins\n{name}\n.".encode())
    with pytest.raises(ValueError, match=f"it asks for builtins.{name}"):
        read_stats(tmp_path / "stats.pkl")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"action": {"min": [0], "max": [1]}}, r"expected \{'out_ori_act'.*found \['action'\]"),
        ([1, 2], "expected .*found list"),
        ({"out_ori_act": {"mean": [0]}}, r"found \['mean'\]"),
        ({"out_ori_act": {"min": ["a"], "max": [1]}}, "no lists of numbers"),
        ({"out_ori_act": {"min": [[0]], "max": [[1]]}}, "no lists of numbers"),
        ({"out_ori_act": {"min": None, "max": [1]}}, "no lists of numbers"),
        ({"out_ori_act": {"min": [0], "max": [10**400]}}, "no lists of numbers"),
        ({"out_ori_act": {"min": [], "max": []}}, "two lists of finite numbers"),
        ({"out_ori_act": {"min": [0, 0], "max": [1]}}, "two lists of finite numbers"),
        ({"out_ori_act": {"min": [0], "max": [float("nan")]}}, "two lists of finite numbers"),
        ({"out_ori_act": {"min": [0], "max": [1e300]}}, "two lists of finite numbers"),
        ({"out_ori_act": {"min": [2], "max": [1]}}, "min not above max"),
    ],
)
@pytest.mark.parametrize("suffix", ["json", "pkl"])
def test_other_statistics(content, message, suffix, tmp_path):
    file = tmp_path / f"stats.{suffix}"
    file.write_bytes(json.dumps(content).encode() if suffix == "json" else pickle.dumps(content))
    with pytest.raises(ValueError, match=message):
        read_stats(file)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'"' + b"x" * MAX_FILE + b'"'])
@pytest.mark.parametrize("suffix", ["json", "pkl"])
def test_damaged_file(content, suffix, tmp_path):
    file = tmp_path / f"stats.{suffix}"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"{file}"):
        read_stats(file)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("dtype", ["f8", ">f8", "f4", "f2", "i8", ">i2", "u1", list, "numbers"])
def test_every_pickle_protocol_and_type(protocol, dtype, tmp_path):
    low, high = [-1.0, 0.0], [0.0, 1.0]
    if dtype == "numbers":
        low, high = map(list, (np.array(low), np.array(high, np.float32)))
    elif dtype is not list:
        low, high = np.abs(np.array(low)).astype(dtype) * 0, np.array(high).astype(dtype)
    stats = {"out_ori_act": {"min": low, "max": high, "count": np.array([3])}, "other": (None, True, "ü")}
    (tmp_path / "stats.pkl").write_bytes(pickle.dumps(stats, protocol))
    found = read_stats(tmp_path / "stats.pkl")
    np.testing.assert_array_equal(found["max"], [0.0, 1.0])
    np.testing.assert_array_equal(found["min"], np.asarray(low, np.float32))


class Calls:
    """An object whose pickle calls a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def wrapped(inner: bytes) -> bytes:
    """A pickle of statistics whose "min" is made by the instructions `inner`."""
    return b"\x80\x04}\x8c\x0bout_ori_act}(\x8c\x03min" + inner + b"\x8c\x03max](K\x01K\x01eus."


def array(shape: bytes, code: bytes = b"\x8c\x02f8", raw: bytes = b"C\x08" + bytes(8)) -> bytes:
    """Instructions that make an array as NumPy's pickles do."""
    made = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R"
    kind = (
        b"cnumpy\ndtype\n"
        + code
        + b"\x89\x88\x87R(K\x03\x8c\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    )
    return made + b"(K\x01" + shape + kind + b"\x89" + raw + b"tb"


def nested(begin: bytes, end: bytes) -> bytes:
    """A list of 60 lists or tuples, each of which holds the one before twice, still open at its end."""
    first = b"](" + begin + b"K\x00K\x01" + end
    return first + b"".join(begin + b"h%ch%c" % (i, i) + end for i in range(60))


HUGE = b"\x8a\x08" + (2**60).to_bytes(8, "little")
FORGED = {
    "system": pickle.dumps(Calls(print, "called")),
    "array of objects": wrapped(array(b"K\x01\x85", b"\x8c\x01O")),
    "array of texts": wrapped(array(b"K\x01\x85", b"\x8c\x02U2")),
    "array of records": wrapped(array(b"K\x01\x85", b"\x8c\x05f4,f4")),
    "array of raw memory": wrapped(array(b"K\x01\x85", b"\x8c\x02V8")),
    "array of dates": wrapped(array(b"K\x01\x85", b"\x8c\x02M8")),
    "array of complex numbers": wrapped(array(b"K\x01\x85", b"\x8c\x02c8")),
    "array of objects in a list": wrapped(array(b"K\x01\x85", b"\x8c\x01O", b"]N\x61")),
    "array longer than its bytes": wrapped(array(b"K\x02\x85")),
    "array of 2**60": wrapped(array(HUGE + b"\x85")),
    "array of -1": wrapped(array(b"J\xff\xff\xff\xff\x85")),
    "array of 2**60 × 0": wrapped(array(HUGE + b"K\x00\x86", raw=b"C\x00")),
    "array of 40 axes": wrapped(array(b"(" + b"K\x01" * 40 + b"t")),
    "array with a float axis": wrapped(array(b"G" + struct.pack(">d", 1.0) + b"\x85")),
    "array without numbers": wrapped(b"cnumpy.core.multiarray\n_reconstruct\n)R"),
    "array as a buffer of objects": wrapped(
        b"cnumpy.core.numeric\n_frombuffer\n(C\x08" + bytes(8)
        + b"cnumpy\ndtype\n\x8c\x01O\x85RK\x01\x85\x8c\x01CtR"
    ),
    "number of an object": wrapped(
        b"cnumpy.core.multiarray\nscalar\ncnumpy\ndtype\n\x8c\x01O\x85RC\x08" + bytes(8) + b"\x86R"
    ),
    "class called": wrapped(b"cnumpy\nndarray\n" + HUGE + b"\x85R"),
    "class made": wrapped(b"cnumpy\nndarray\n" + HUGE + b"\x85\x81"),
    "state of a dict": wrapped(b"}}b"),
    "state of a function": wrapped(b"cnumpy\ndtype\n}b"),
    "text of another coding": wrapped(b"c_codecs\nencode\n\x8c\x01a\x8c\x03zip\x86R"),
    "texts encoded many times": wrapped(
        b"](X" + struct.pack("<I", 50_000) + b"x" * 50_000 + b"\x94c_codecs\nencode\n\x94"
        + b"h\x01h\x00\x8c\x06latin1\x86R" * 3_000 + b"e"
    ),
    "nested references": wrapped(nested(b"](", b"e\x94") + b"e"),
    "nested keys": wrapped(nested(b"(", b"t\x94") + b"}h\x3cNse"),
    "nested set": wrapped(nested(b"(", b"t\x94") + b"\x8f(h\x3c\x90e"),
    "depth": wrapped(b"]" * 45_000 + b"a" * 44_999),
    "depth of tuples": wrapped(b")" + b"\x85" * 90_000),
    "marks": wrapped(b"(" * 90_000),
    "marks taken off": wrapped(b"K\x00" * 20_000 + b"(1" * 20_000),
    "memo of 2**31": wrapped(b"]r\xff\xff\xff\x7f"),
    "text of 2**31": wrapped(b"X\xff\xff\xff\x7f"),
    "bytes of 2**62": wrapped(b"\x8e" + (2**62).to_bytes(8, "little")),
    "byte array of 2**40": wrapped(b"\x96" + (2**40).to_bytes(8, "little")),
    "frame of 2**60": b"\x80\x04\x95" + (2**60).to_bytes(8, "little") + b"N.",
    "number of 2**31 bytes": wrapped(b"\x8b\xff\xff\xff\x7f"),
    "number of many digits": wrapped(b"I" + b"9" * 90_000 + b"\n"),
    "number of a million bits": wrapped(b"](\x8b" + struct.pack("<i", 90_000) + b"\x7f" * 90_000 + b"e"),
    "buffer outside of the file": wrapped(b"\x97"),
    "extension registry": wrapped(b"\x82\x01"),
    "persistent object": wrapped(b"Pname\n"),
    "instance": wrapped(b"(iposix\nsystem\n"),
    "object": wrapped(b"(cposix\nsystem\n\x8c\x02lso"),
    "other protocol": b"\x80\xff.",
    "nothing on the stack": b"\x80\x04.",
    "list that holds itself": wrapped(b"]\x94h\x00a"),
}  # fmt: skip


def forbid(event: str, arguments: tuple) -> None:
    if event in ("import", "exec", "compile", "os.system", "subprocess.Popen", "pickle.find_class"):
        raise RuntimeError(f"{event} {arguments}")


def read_all(forged: dict, folder, out) -> None:
    """In a process of its own: sends (name, what came of it) of each file."""
    with open("/proc/self/statm") as memory:
        used = int(memory.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 400 * 2**20,) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
    sys.addaudithook(forbid)
    for name, content in forged.items():
        (folder / "stats.pkl").write_bytes(content)
        try:
            out.send((name, f"read {read_stats(folder / 'stats.pkl')}"))
        except BaseException as error:
            out.send((name, f"{type(error).__name__}: {error}"))
    out.close()


def test_forged_pickles(tmp_path):
    """Each ends in one ValueError, within 400 MiB and a minute for all of them, and nothing is called."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=read_all, args=(FORGED, tmp_path, sender))
    process.start()
    sender.close()
    found = {}
    try:
        while True:
            name, result = receiver.recv()
            found[name] = result
    except EOFError:
        process.join()
    assert found.keys() == FORGED.keys(), f"ended with {process.exitcode} after {list(found)[-1:]}"
    wrong = {name: result for name, result in found.items() if not result.startswith("ValueError: ")}
    assert not wrong


def read_or_refuse(content: bytes, tmp_path_factory) -> None:
    file = tmp_path_factory.getbasetemp() / "fuzzed.pkl"
    file.write_bytes(content)
    try:
        stats = read_stats(file)
    except ValueError as error:
        assert str(file) in str(error)
    else:
        assert all(value.isfinite().all() and value.ndim == 1 for value in stats.values())


ARGUMENTS = st.one_of(
    st.binary(max_size=9),
    st.sampled_from([b"numpy\ndtype\n", b"os\nsystem\n", b"1\n", b"'f8'\n", b"\x02f8", b"\x00", b"\x01"]),
    st.just(b"\x08" + bytes(8)),
)
INSTRUCTION = st.builds(
    lambda instruction, argument: (
        instruction.code.encode("latin-1") + argument * (instruction.arg is not None)
    ),
    st.sampled_from(pickletools.opcodes),
    ARGUMENTS,
)


@settings(max_examples=150, deadline=None)
@given(st.lists(INSTRUCTION, max_size=30))
def test_random_instructions(tmp_path_factory, instructions):
    read_or_refuse(wrapped(b"".join(instructions)), tmp_path_factory)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_mutated_files(tmp_path_factory, data):
    originals = [pickle.dumps(GOOD, protocol) for protocol in (0, 2, 4, 5)] + [f.read_bytes() for f in REAL]
    content = io.BytesIO(data.draw(st.sampled_from(originals))).getbuffer().tobytes()
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(content)))
        end = min(len(content), start + data.draw(st.integers(0, 8)))
        content = content[:start] + data.draw(st.binary(max_size=8)) + content[end:]
    read_or_refuse(content, tmp_path_factory)
