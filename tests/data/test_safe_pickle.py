"""The restricted unpickler: reads what NumPy writes, refuses everything else without running it."""

from __future__ import annotations

import builtins
import collections
import functools
import gzip
import os
import pickle
import subprocess

import numpy as np
import pytest

from dinovmf_plugin.data.safe_pickle import load_plain_pickle

ARRAYS = [
    np.arange(6),
    np.arange(6, dtype=">u2").reshape(2, 3),
    np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    np.array([True, False]),
    np.array(["all_souls_000013", "x"]),
    np.array([], dtype=np.int32),
    np.array(3.5),
]


@pytest.mark.parametrize("protocol", range(6))
def test_plain_data__round_trip(tmp_path, protocol):
    content = {
        "names": ["a", "b"],
        "numbers": (1, 2.5, None, True, b"bytes \xff"),
        "scalar": np.int64(7),
        "arrays": [*ARRAYS, ARRAYS[0]],
    }
    path = tmp_path / "plain.pkl"
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    got = load_plain_pickle(path)
    assert got["names"] == content["names"]
    assert got["numbers"] == content["numbers"]
    assert got["scalar"] == 7
    for array, expected in zip(got["arrays"], content["arrays"], strict=True):
        assert array.dtype == expected.dtype
        assert array.shape == expected.shape
        assert (array == expected).all()


def test_packed_file__unpacked_and_as_careful(tmp_path):
    path = tmp_path / "labels.gz"
    path.write_bytes(gzip.compress(pickle.dumps(np.arange(6, dtype=np.uint8).reshape(2, 3))))
    np.testing.assert_array_equal(load_plain_pickle(path), [[0, 1, 2], [3, 4, 5]])
    target = tmp_path / "pwned"
    path.write_bytes(gzip.compress(pickle.dumps(Calls(os.system, f"touch {target}"))))
    with pytest.raises(ValueError, match=r"labels\.gz was refused: it asks for posix\.system"):
        load_plain_pickle(path)
    assert not target.exists()
    path.write_bytes(b"no gzip")
    with pytest.raises(ValueError, match=r"labels\.gz was refused: Not a gzipped file"):
        load_plain_pickle(path)


def test_numpy_1_and_python_2_names(tmp_path):
    path = tmp_path / "old.pkl"
    data = pickle.dumps(np.arange(3), protocol=2)
    path.write_bytes(data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert load_plain_pickle(path).tolist() == [0, 1, 2]
    # Python 2 wrote the array's bytes as a str (opcode U), with bytes above 127 among them
    old = (
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01K\x02\x85cnumpy\ndtype\nU\x02u2K\x00K\x01\x87R"
        b"(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x04\xff\x00\x00\x01tb."
    )
    path.write_bytes(old)
    assert load_plain_pickle(path).tolist() == [255, 256]


class Calls:
    """Pickles to a call of ``function``."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def attacks(target):
    touch = f"touch {target}"
    return {
        "os.system": Calls(os.system, touch),
        "subprocess": Calls(subprocess.call, ["touch", str(target)]),
        "exec": Calls(builtins.exec, f"open({str(target)!r}, 'w').close()"),
        "open": Calls(builtins.open, str(target), "w"),
        "partial": Calls(functools.partial, os.system, touch),
        "numpy.save": Calls(np.save, str(target), 1),
        "getattr": Calls(getattr, os, "system"),
        "inside a list": {"gnd": [{"easy": Calls(os.system, touch)}]},
        "object array": np.array([Calls(os.system, touch)], dtype=object),
    }


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("name", list(attacks("x")))
def test_malicious__refused_and_not_run(tmp_path, name, protocol):
    target = tmp_path / "pwned"
    attack = attacks(target)[name]
    path = tmp_path / "evil.pkl"
    if name == "getattr":  # the module itself cannot be pickled: name it by hand
        path.write_bytes(b"cbuiltins\ngetattr\n(cos\npath\nS'join'\ntR.")
    else:
        path.write_bytes(pickle.dumps(attack, protocol=protocol))
    with pytest.raises(ValueError, match="was refused: .*only plain lists"):
        load_plain_pickle(path)
    assert not target.exists()
    assert not target.with_suffix(".npy").exists()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "Ran out of input"),
        (b"not a pickle", "refused"),
        (pickle.dumps(list(range(9)))[:-4], "refused"),
        (pickle.dumps(collections.OrderedDict(a=1)), "asks for collections.OrderedDict"),
        (pickle.dumps({1, 2}), "holds a set"),
        (pickle.dumps(np.ndarray), "holds a"),
        (b"c_codecs\nencode\n(S'aaaa'\nS'bz2'\ntR.", "refused to encode with 'bz2'"),
        (b"cnumpy\ndtype\n(S'O'\nI0\nI1\ntR.", "array type 'O' is not a plain"),
        (b"cnumpy._core.multiarray\nscalar\n(cnumpy\ndtype\n(S'i8'\ntRS'abc'\ntR.", "damaged"),
        (b"(lp0\ng0\na.", "more than 16 levels"),
    ],
)
def test_damaged_or_other__refused(tmp_path, data, reason):
    path = tmp_path / "gnd.pkl"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=reason) as caught:
        load_plain_pickle(path)
    assert "gnd.pkl was refused" in str(caught.value)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_plain_pickle(tmp_path / "none.pkl")
