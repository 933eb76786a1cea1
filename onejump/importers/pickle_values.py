"""How the arguments of a pickle's opcodes become values. Raises ValueError for what is none."""

from onejump.importers.inert import LongText

MAX_INTEGER = 256  # bytes
LONG_TEXT = 1 << 20  # bytes; a longer text stays undecoded in the file
KEYS = (str, int, float, bool, type(None))  # tuples and huge integers can be made to collide, so that a dict hangs


def text(data: memoryview) -> str | LongText:
    if len(data) > LONG_TEXT:
        return LongText(data)
    try:
        return str(data, "utf-8", "surrogatepass")
    except UnicodeDecodeError:
        raise ValueError("a text that is not UTF-8") from None


def old_text(data: memoryview) -> str | memoryview:
    """Python 2 has one type for texts and for bytes."""
    return str(data, "ascii") if len(data) <= LONG_TEXT and bytes(data).isascii() else data


def integer(data: memoryview) -> int:
    """Signed, little-endian; no bytes are 0."""
    if len(data) > MAX_INTEGER:
        raise ValueError("a number of too many digits")
    return int.from_bytes(data, "little", signed=True)


def quoted(line: bytes) -> str:
    if len(line) < 2 or line[:1] != line[-1:] or line[:1] not in (b"'", b'"') or b"\\" in line:
        raise ValueError("a text with escapes")
    return line[1:-1].decode("ascii")


def items_of(values: list) -> dict:
    keys = values[::2]
    if len(values) % 2 or not all(map(is_key, keys)):
        raise ValueError("a key that is neither a text nor a number")
    return dict(zip(keys, values[1::2], strict=True))


def is_key(value: object) -> bool:
    return type(value) in KEYS and not (isinstance(value, int) and value.bit_length() > 64)


def elements(values: list | tuple) -> list | tuple:
    if not all(map(is_key, values)):
        raise ValueError("a set of something else than texts and numbers")
    return values


def unsigned(data: memoryview) -> int:
    return int.from_bytes(data, "little")


def number_on_line(line: bytes) -> int | bool:
    return {b"00": False, b"01": True}[line] if line in (b"00", b"01") else int(line.removesuffix(b"L"))
