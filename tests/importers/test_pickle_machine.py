"""The pickle machine: every protocol's values, nothing called, every damage and every bomb a UserError."""

import pickle
import struct
from collections import OrderedDict

import pytest

from onejump.importers.inert import Budget, Call, Global, Inert, LongText
from onejump.importers.pickle_machine import Machine
from onejump.types import UserError

VALUES = {
    "numbers": [0, 1, -1, 255, 256, 65535, 65536, -(2**31), 2**31, 2**63, -(2**100), 1.5, -0.0, float("inf")],
    "texts": ["", "a", "é\U0001f600\n\\", "x" * 300, "\ud800"],
    "plain": (None, True, False, (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), [[]], {"a": {1: None, 2.5: "b"}}),
    "long": list(range(2500)),
}


def read(data: bytes, meaning: Inert | None = None) -> object:
    return Machine(memoryview(data), meaning or Inert(), Budget("FILE", len(data))).run()


def refused(data: bytes, why: str) -> None:
    with pytest.raises(UserError, match=why) as caught:
        read(data)
    assert str(caught.value).startswith("FILE: not a readable pickle (") and "\n" not in str(caught.value)


@pytest.mark.parametrize("protocol", range(6))
def test_plain_values_are_read_in_every_protocol(protocol):
    assert repr(read(pickle.dumps(VALUES, protocol))) == repr(VALUES)


def test_sets_and_bytes_are_read_and_bytes_are_slices_of_the_file():
    data = pickle.dumps({"s": {1, "a"}, "f": frozenset([2]), "b": b"123" * 100, "a": bytearray(b"xy")}, 5)
    value = read(data)
    assert value["s"] == {1, "a"} and value["f"] == frozenset([2])
    assert value["b"] == b"123" * 100 and value["a"] == b"xy"
    assert value["b"].obj is data


@pytest.mark.parametrize("protocol", range(6))
def test_shared_and_recursive_values_stay_so(protocol):
    value: list = [{}]
    value += [value[0], value]
    result = read(pickle.dumps(value, protocol))
    assert result[0] is result[1] and result[2] is result


def test_python_2_texts_are_texts_or_bytes():
    assert read(b"\x80\x02U\x03abcT\x02\x00\x00\x00\xff\x00\x86.") == ("abc", b"\xff\x00")


def test_long_texts_stay_in_the_file():
    data = pickle.dumps("y" * (1 << 21), 4)
    value = read(data)
    assert isinstance(value, LongText) and value.data.obj is data and len(value.data) == 1 << 21


class Called:
    def __init__(self, *reduced: object):
        self.reduced = reduced

    def __reduce__(self) -> tuple:
        return self.reduced


@pytest.mark.parametrize("protocol", range(6))
def test_calls_become_records_of_function_arguments_state_and_items(protocol):
    for reduced, items in [
        ((complex, (1, 2), {"s": 3}), []),
        ((OrderedDict, (), None, None, iter([("a", 1)])), [("a", 1)]),
        ((list, (), None, iter([4, 5])), [4, 5]),
    ]:
        made = read(pickle.dumps(Called(*reduced), protocol))
        assert isinstance(made, Call) and made.function.name == reduced[0].__name__ and made.args == reduced[1]
        assert made.items == items and made.state == (reduced[2] if len(reduced) == 3 else None)


@pytest.mark.parametrize(
    "data, function",
    [
        (b"(cos\nsystem\nX\x01\x00\x00\x00ao.", "system"),
        (b"(X\x01\x00\x00\x00aios\nsystem\n.", "system"),
        (b"cos\nsystem\n(X\x01\x00\x00\x00atR.", "system"),
        (b"\x80\x02cos\nsystem\nX\x01\x00\x00\x00a\x85\x81.", "system"),
        (b"\x80\x04\x8c\x02os\x8c\x0bpath.system\x93\x8c\x01a\x85}\x92.", "path.system"),
    ],
    ids=["OBJ", "INST", "REDUCE", "NEWOBJ", "NEWOBJ_EX"],
)
def test_every_opcode_that_calls_leaves_a_record(data, function):
    made = read(data)
    assert isinstance(made, Call) and made.function == Global("os", function) and made.args == ("a",)


def test_persistent_ids_are_collected():
    meaning = Inert()
    read(b"X\x01\x00\x00\x00kQPline\n\x86.", meaning)
    assert meaning.identities == ["k", "line"]


@pytest.mark.parametrize(
    "data, why",
    [
        (b"", "cut short"),
        (b"\x80\x04", "cut short"),
        (b"X\xff\xff\xff\xffabc.", "cut short"),
        (b"\x8e" + b"\xff" * 8 + b".", "cut short"),
        (b"\x80\x04\x95\xff\x00\x00\x00\x00\x00\x00\x00N.", "cut short"),
        (b".", "takes more than there is"),
        (b"N(.", "takes more than there is"),
        (b"t.", "takes more than there is"),
        (b"Na.", "takes more than there is"),
        (b"]NNs.", "not a dict"),
        (b"NNa.", "not a list"),
        (b"N(e.", "not a list"),
        (b"N(K\x01\x90.", "not a set"),
        (b"}(]Nu.", "neither a text nor a number"),
        (b"}(K\x01u.", "neither a text nor a number"),
        (b"}()Nu.", "neither a text nor a number"),
        (b"(]\x91.", "set of something else"),
        (b"h\x05.", "never made"),
        (b"Np-1\n.", "impossible number"),
        (b"NNR.", "not a tuple"),
        (b"\x80\x06N.", "protocol 6"),
        (b"\x82\x01.", "opcode 0x82"),
        (b"\x97.", "opcode 0x97"),
        (b"\xff.", "opcode 0xff"),
        (b"NN\x93.", "not a text"),
        (b"cos.", "no end"),
        (b"Iabc\n.", "invalid literal"),
        (b"I" + b"9" * 5000 + b"\n.", "no end"),
        (b"X\x01\x00\x00\x00\xff.", "UTF-8"),
        (b"S'a\\x00'\n.", "escapes"),
        (b"\x8b\x00\x04\x00\x00" + b"\x01" * 1024 + b".", "too many digits"),
        (b"(o.", "not enough values"),
    ],
)
def test_damage_is_named(data, why):
    refused(data, why)


def test_numbers_made_to_collide_are_refused_as_keys():
    data = b"".join(b"\x8a\x10" + (k * (2**61 - 1) << 4).to_bytes(16, "little") + b"N" for k in range(1, 100))
    refused(b"}(" + data + b"u.", "neither a text nor a number")


def test_values_shared_a_billion_times_are_read_in_no_time():
    """Each list holds the one before it ten times: 10^30 elements if they were walked."""
    value: list = []
    for _ in range(30):
        value = [value] * 10
    assert len(read(pickle.dumps(value, 4))) == 10


def test_several_pickles_are_read_one_after_another():
    data = pickle.dumps("a", 2) + pickle.dumps(7, 4) + struct.pack("<q", 9)
    machine = Machine(memoryview(data), Inert(), Budget("FILE", 0))
    assert (machine.run(), machine.run(), machine.count(8)) == ("a", 7, 9)
