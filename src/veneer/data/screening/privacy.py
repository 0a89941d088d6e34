"""Finds personal data and secrets in training text, offline: e-mails, phones, cards, IBANs, IPs, national ids, keys.

A model can recite what it was trained on, so such text is worth seeing, or blanking, before training. A span counts
where its shape is unmistakable or its checksum holds; a bare run of digits counts only beside a word that says what it
is ("SSN", "phone"). So ordinary numbers, dates, prices, versions, UUIDs and hashes pass. It leaves out names and
street addresses, which take a model to find, addresses written out ("john at example dot com"), digits outside ASCII,
and passwords in running prose. Checksums and numbering plans come from `python-stdnum` and `phonenumbers`.

Most rows hold nothing. Cheap tests over the whole text therefore come first, and the two libraries are imported only
where a candidate stands. What was found is named by its place alone, never repeated. Formats of keys and of national
ids stand in privacy.yaml.
"""

import importlib
import ipaddress
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from veneer.config.files import packaged_table

# The most specific come first: of two findings that overlap, the earlier kind stays.
KINDS = ("secret", "email", "iban", "card", "national_id", "ip_address", "phone")


@dataclass(frozen=True, slots=True)
class Finding:
    """A span of characters, `text[start:end]`, and which of KINDS it is."""

    kind: str
    start: int
    end: int


def find(text: str) -> list[Finding]:
    """Every finding, in order of place, none overlapping another."""
    found = list(_secrets(text))
    if "@" in text:
        found += _emails(text)
    if _QUAD.search(text) or _COLONS.search(text):
        found += _ip_addresses(text)
    if _digits(text) >= _FEWEST_DIGITS:
        for run in _RUN.finditer(text):
            if _digits(run[0]) >= _FEWEST_DIGITS:
                # Two characters more, for what must not touch a number.
                within = max(0, run.start() - 2), run.end() + 2
                for search in (_ibans, _cards, _national_ids, _phones):
                    found += search(text, *within)
    kept: list[Finding] = []
    for finding in sorted(found, key=lambda f: f.start):
        if kept and finding.start < kept[-1].end and _rank(finding) < _rank(kept[-1]):
            kept.pop()
        if not kept or finding.start >= kept[-1].end:
            kept.append(finding)
    return kept


def _rank(finding: Finding) -> tuple[int, int]:
    """The more specific kind first, then the longer span."""
    return KINDS.index(finding.kind), finding.start - finding.end


def redact(text: str, findings: Sequence[Finding]) -> str:
    """The text with each span, sorted and apart as `find` gives them, replaced by its kind: "[EMAIL]", "[CARD]"."""
    pieces, end = [], 0
    for finding in findings:
        pieces += [text[end : finding.start], f"[{finding.kind.upper()}]"]
        end = finding.end
    return "".join([*pieces, text[end:]])


# The cheap tests. A regex begins with a literal or a plain set, which its engine skips ahead to.
_FEWEST_DIGITS = 4  # an Indian PAN has four, all others more
_NO_DIGITS = bytes(set(range(256)) - set(b"0123456789"))
# Capitals and digits with two separators or fewer between: holds every number below, and few words.
_RUN = re.compile(r"[A-Z0-9](?:[ \u00a0().\-/\u2010\u2011]{0,2}[A-Z0-9]){6,}")
_QUAD = re.compile(r"\.[0-9]{1,3}\.[0-9]")
_COLONS = re.compile(r":[0-9A-Fa-f]{0,4}:")


def _digits(text: str) -> int:
    return len(text.encode("utf-8", "replace").translate(None, _NO_DIGITS))


# What may not touch a number: letters, more of a number, a currency or an order sign. ASCII alone, since Chinese
# and Japanese put no space between a word and a number.
_LEFT = r"(?<![A-Za-z0-9_$€£¥#+])(?<![A-Za-z0-9_][-./,@])(?<![0-9][:=*])"
_RIGHT = r"(?![A-Za-z0-9_%])(?![-./,:=@][A-Za-z0-9])"
_SPACE = "[ \u00a0]"
_HYPHEN = "[-\u2010\u2011]"
_GAP = "[-. \u00a0\u2010\u2011]"


_TABLES = packaged_table("veneer.data.screening", "privacy.yaml")
# By the rarest character of the literal, since looking for one character takes a tenth of the time of looking for two.
_KEYS: dict[str, list[tuple[str, re.Pattern[str]]]] = defaultdict(list)
for _vendor, _leads, _rest in _TABLES["secrets"]:
    for _lead in _leads:
        _key = re.compile(rf"(?<!\w){re.escape(_lead)}{_rest}(?![A-Za-z0-9])", re.ASCII)
        _KEYS[max(_lead, key="-SEIBGxzKJX=_".find)].append((_lead, _key))
# `password = "..."`, `"api_key": "..."`, `Authorization: Bearer ...`: the value, then the name that stands before it.
_ASSIGNED = re.compile(r"[=:]>?[ \t]{0,3}(?:Bearer |Basic )?[\"'`]?([A-Za-z0-9+/=_.~!@#$%^&*-]{8,200}+)(?![(\[{<])")
_SECRET_NAME = re.compile(
    r"(?:passw(?:or)?d|passphrase|passcode|pwd|secret|token|(?:api|access|secret|private|account|auth)[_ -]?key"
    r"|authorization|credentials?)(?: is)?[\"'`]?\s*$",
    re.IGNORECASE,
)
# Only with a digit, since guides write "user:password@host".
_URL_PASSWORD = re.compile(r"://[^\s:/@]{1,64}:(?=[^\s/@]{0,199}[0-9])([^\s/@<>{}$]{4,200})@")


def _secrets(text: str) -> Iterator[Finding]:
    for rarest, keys in _KEYS.items():
        if rarest in text:
            for lead, pattern in keys:
                if lead in text:
                    for match in pattern.finditer(text):
                        yield Finding("secret", *match.span())
    if "=" in text or ":" in text:
        for match in _ASSIGNED.finditer(text):
            named = _SECRET_NAME.search(text[max(0, match.start() - 40) : match.start()])
            if named and _is_random(match[1]):
                # A full stop at the end is the sentence's.
                yield Finding("secret", match.start(1), match.start(1) + len(match[1].rstrip(".")))
    if "://" in text and "@" in text:
        for match in _URL_PASSWORD.finditer(text):
            yield Finding("secret", *match.span(1))


def _is_random(value: str) -> bool:
    """Whether a value reads as drawn at random, unlike a name, a path or a placeholder."""
    digits = sum(c.isdigit() for c in value)
    if len(value) < 16:
        return digits > 0 and any(c.islower() for c in value) and any(c.isupper() for c in value)
    bits = -sum(n / len(value) * math.log2(n / len(value)) for n in Counter(value).values())
    return bits >= 3 and digits >= 2 and any(c.isalpha() for c in value) and not value.startswith(("/", "."))


_LATIN = "A-Za-z0-9À-ɏ"
_LOCAL = re.compile(rf"(?<![{_LATIN}.])[{_LATIN}_](?:[{_LATIN}_.%+'-]*[{_LATIN}_%+-])?$")
# `a@self.b` and `a@b.mean(` are matrix products in Python.
_DOMAIN = re.compile(rf"@(?!self\.)(?:[{_LATIN}][{_LATIN}-]{{0,62}}\.)+[A-Za-z]{{2,24}}(?![A-Za-z0-9_(])")
_NO_ADDRESS = re.compile(r"git@|.*@[1-4]x\.(?:png|jpe?g|gif|webp|svg)$")  # a remote; a picture's scale


def _emails(text: str) -> Iterator[Finding]:
    for domain in _DOMAIN.finditer(text):
        # Searched from the @ back, since a search for the local part would try every word of the text.
        first = max(0, domain.start() - 64)
        local = _LOCAL.search(text[first : domain.start()])
        if local and not _NO_ADDRESS.match(text, first + local.start(), domain.end()):
            yield Finding("email", first + local.start(), domain.end())


_IPV4 = re.compile(rf"{_LEFT}[0-9]{{1,3}}(?:\.[0-9]{{1,3}}){{3}}(?![A-Za-z0-9_])(?!\.[0-9])")
# Every address in use starts with four hexadecimal digits, which C++'s `a::b` and Python's `[1::2]` do not.
_IPV6 = re.compile(r"(?<![\w:.])[0-9A-Fa-f]{4}:(?:[0-9A-Fa-f]{0,4}:){1,6}[0-9A-Fa-f]{0,4}(?![\w:])", re.ASCII)
_NOT_IP = re.compile(r"(?:\bv|\bver\.?|version|release|build|firmware|section|chapter|clause|§)[ :]*$", re.IGNORECASE)


def _ip_addresses(text: str) -> Iterator[Finding]:
    for match in [*_IPV4.finditer(text), *_IPV6.finditer(text)]:
        try:
            address = ipaddress.ip_address(match[0])
        except ValueError:
            continue
        nobody = address.is_loopback or address.is_unspecified or address.is_multicast
        # A netmask; four single digits, which are a version, a heading or a public resolver such as 8.8.8.8.
        no_host = address.version == 4 and (address.is_reserved or len(match[0]) == 7)
        slice_like = address.version == 6 and re.fullmatch("[0-9]+::[0-9]*|[A-Fa-f:]+", match[0])
        numbered = _NOT_IP.search(text[max(0, match.start() - 24) : match.start()])
        if not (nobody or no_host or slice_like or numbered):
            yield Finding("ip_address", *match.span())


_IBAN = re.compile(rf"{_LEFT}[A-Z]{{2}}[0-9]{{2}}(?:[ \u00a0-]?[A-Z0-9]{{4}}){{2,7}}(?:[ \u00a0-]?[A-Z0-9]{{1,3}})?")
# By the first digits of the issuers: sixteen digits, fifteen of American Express, fourteen of Diners Club.
_CARD = re.compile(
    rf"{_LEFT}(?:(?=4|5[1-5]|2[2-7]|35|6011|62|64[4-9]|65)[0-9]{{4}}([ -]?)[0-9]{{4}}\1[0-9]{{4}}\1[0-9]{{4}}"
    rf"|3[47][0-9]{{2}}([ -]?)[0-9]{{6}}\2[0-9]{{5}}|3(?:[68][0-9]|0[0-5])[0-9]([ -]?)[0-9]{{6}}\3[0-9]{{4}}){_RIGHT}"
)


def _ibans(text: str, first: int, last: int) -> Iterator[Finding]:
    for match in _IBAN.finditer(text, first, last):
        if end := _longest(text, *match.span(), lambda value: _checks("iban", value)):
            yield Finding("iban", match.start(), end)


def _cards(text: str, first: int, last: int) -> Iterator[Finding]:
    for match in _CARD.finditer(text, first, last):
        if _checks("luhn", re.sub("[ -]", "", match[0])):
            yield Finding("card", *match.span())


def _longest(text: str, start: int, end: int, fits: Callable[[str], bool]) -> int | None:
    """The end of the longest run of whole groups from `start` that fits, since a number may swallow the next word."""
    while end - start > 6:
        if fits(text[start:end]):
            return end
        end = max(text.rfind(gap, start, end) for gap in " \u00a0-./")
    return None


def _checks(module: str, value: str) -> bool:
    try:
        return bool(importlib.import_module(f"stdnum.{module}").is_valid(value))
    except (LookupError, ValueError, ArithmeticError):  # as cn.ric raises for a district its table lacks
        return False


_FORMS = [(module, re.compile(rf"{_LEFT}{form}{_RIGHT}", re.ASCII)) for module, form in _TABLES["formatted"]]
_NAMES = [(module, re.compile(words)) for module, words in _TABLES["named"]]
_BARE_ID = re.compile(rf"{_LEFT}[A-Z]{{0,2}}[0-9](?:[ /-]?[0-9]){{5,15}}[A-Z]{{0,2}}{_RIGHT}")
_PASSPORT = re.compile(r"[A-Z]{0,2}[0-9]{6,9}")


def _national_ids(text: str, first: int, last: int) -> Iterator[Finding]:
    for module, form in _FORMS:
        for match in form.finditer(text, first, last):
            if not module or _checks(module, match[0]):
                yield Finding("national_id", *match.span())
    for match in _BARE_ID.finditer(text, first, last):
        after = re.split(r"[.,;]\s|\n", text[match.end() : match.end() + 30], maxsplit=1)[
            0
        ]  # beyond, it names the next
        near = f"{text[max(0, match.start() - 40) : match.start()]} | {after}"
        bare = re.sub("[ /-]", "", match[0])
        for module, words in _NAMES:
            if words.search(near) and (_checks(module, bare) if module else _PASSPORT.fullmatch(bare)):
                yield Finding("national_id", *match.span())
                break


_ABROAD = re.compile(r"(?<![A-Za-z0-9_+])\+[1-9](?:[ \u00a0().\-/\u2010\u2011]{0,2}[0-9]){6,14}(?![0-9])")
_AT_HOME = [
    re.compile(rf"{_LEFT}(?<![0-9] ){shape}{_RIGHT}(?! [0-9])")  # in no longer row of numbers
    for shape in (
        # North American. With a bracket or hyphens any digits will do, as made-up numbers have them: 555-123-4567.
        rf"(?:1{_GAP})?\([0-9]{{3}}\){_SPACE}?[0-9]{{3}}{_GAP}[0-9]{{4}}",
        rf"(?:1{_HYPHEN})?[0-9]{{3}}({_HYPHEN})[0-9]{{3}}\1[0-9]{{4}}",
        rf"(?:1[ .])?[2-9][0-9]{{2}}([.]|{_SPACE})[2-9][0-9]{{2}}\1[0-9]{{4}}",
        # With the 0 of a long-distance call: five pairs, or the area in front. ISBNs and dates have other groups.
        r"0[1-9]([ .-])[0-9]{2}(?:\1[0-9]{2}){3}",
        rf"\(?0[1-9][0-9]{{0,4}}\)?(?:[/-]|{_SPACE})[0-9]{{3,8}}(?:{_GAP}[0-9]{{2,8}}){{0,3}}",
    )
]
# Beside a word that says so, bare digits and local numbers count too.
_CALLED = re.compile(rf"{_LEFT}(?:[0-9]{{10,11}}|[0-9]{{3}}{_HYPHEN}[0-9]{{4}}|[0-9]{{5}} [0-9]{{5,6}}){_RIGHT}")
_PHONE_WORD = re.compile(
    r"(?<![a-z])(?:phone|telephone|tel|mobile|cell|fax|whatsapp|call|dial|hotline)(?![a-z])[^0-9\n]{0,20}$",
    re.IGNORECASE,
)


def _phones(text: str, first: int, last: int) -> Iterator[Finding]:
    for match in _ABROAD.finditer(text, first, last):
        if end := _longest(text, *match.span(), _is_phone):
            yield Finding("phone", match.start(), end)
    for shape in _AT_HOME:
        for match in shape.finditer(text, first, last):
            if _is_phone(match[0]):
                yield Finding("phone", *match.span())
    for match in _CALLED.finditer(text, first, last):
        if _PHONE_WORD.search(text[max(0, match.start() - 40) : match.start()]) and _is_phone(match[0]):
            yield Finding("phone", *match.span())


def _is_phone(value: str) -> bool:
    """Whether the numbering plan has room for it. Room alone suffices, so that the 555 numbers of fiction count."""
    import phonenumbers

    if value.startswith("+"):
        regions: tuple[str | None, ...] = (None,)
    elif value.startswith(("0", "(0")):
        if not 9 < sum(c.isdigit() for c in value) < 13:  # the national numbers in use; a ZIP code has nine digits
            return False
        regions = ("GB", "FR", "DE", "IT", "NL", "BE", "CH", "AT", "AU", "NZ", "JP", "IN", "ZA", "BR")
    else:
        regions = ("US", "IN")
    for region in regions:
        try:
            number = phonenumbers.parse(value, region)
        except phonenumbers.NumberParseException:
            continue
        # Of many countries, one would have room for almost anything: abroad the number must be a valid one.
        possible = region in (None, "US", "GB")
        if phonenumbers.is_possible_number(number) if possible else phonenumbers.is_valid_number(number):
            return True
    return False
