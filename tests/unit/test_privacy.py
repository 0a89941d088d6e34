"""What counts as personal data or a secret, and what must pass. Everything here is made up.

Keys are put together from two strings, so that no scanner of repositories takes this file for a leak.
"""

import random
import sys
import time

import pytest

from veneer.data.screening.privacy import KINDS, Finding, find, redact

MIXED = "aB3dE5fG7hJ9kL1mN2pQ4rS6tU8vW0xY" * 4
HEX = "0123456789abcdef" * 4


def spans(text: str) -> list[tuple[str, str]]:
    return [(finding.kind, text[finding.start : finding.end]) for finding in find(text)]


@pytest.mark.parametrize(
    "address",
    [
        "jane.doe@example.com",
        "j@example.org",
        "first.last+tag@mail.example.co.uk",
        "o'brien@example.ie",
        "user_99%x@sub-domain.example.museum",
        "jürgen@müller-example.de",
    ],
)
@pytest.mark.parametrize(
    "sentence", ["{}", "Write to {}.", "<{}>", '{{"to": "{}"}}', "'{}', please", "mailto:{}", "写信给{}吧"]
)
def test_emails(address: str, sentence: str) -> None:
    assert spans(sentence.format(address)) == [("email", address)]


@pytest.mark.parametrize(
    "number",
    [
        "(415) 555-2671",
        "415-555-2671",
        "415.555.2671",
        "415 555 2671",
        "415\u00a0555\u00a02671",
        "415\u2011555\u20112671",
        "1-800-555-0199",
        "555-123-4567",
        "+1 415 555 2671",
        "+14155552671",
        "+1 (415) 555-2671",
        "+44 20 7946 0958",
        "+44 (0)20 7946 0958",
        "+49 30 901820",
        "+91 98765 43210",
        "+33 1 23 45 67 89",
        "020 7946 0958",
        "(020) 7946 0958",
        "07700 900123",
        "01632 960123",
        "01 23 45 67 89",
        "0171 1234567",
        "06-12345678",
        "0412 345 678",
    ],
)
@pytest.mark.parametrize("sentence", ["{}", "Call me: {}.", "tel:{}", "My number, {}, is new", "电话{}。"])
def test_phones(number: str, sentence: str) -> None:
    assert spans(sentence.format(number)) == [("phone", number)]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("Phone: 4155552671", "4155552671"),
        ('{"phone_number": "4155552671"}', "4155552671"),
        ("call 555-0123 now", "555-0123"),
        ("WhatsApp 98765 43210", "98765 43210"),
        ("my mobile is 07700900123", "07700900123"),
    ],
)
def test_a_word_makes_a_phone_of_bare_digits(text: str, number: str) -> None:
    assert spans(text) == [("phone", number)]
    assert spans(f"It has {number} parts") == []


@pytest.mark.parametrize(
    "card",
    [
        "4111 1111 1111 1111",
        "4111-1111-1111-1111",
        "4111111111111111",
        "5555 5555 5555 4444",
        "2223 0031 2200 3222",
        "3782 822463 10005",
        "371449635398431",
        "6011 1111 1111 1117",
        "30569309025904",
        "3530 1113 3330 0000",
    ],
)
def test_cards(card: str) -> None:
    assert spans(f"Pay with {card}, expires 12/29.") == [("card", card)]
    wrong = card[:-1] + str((int(card[-1]) + 1) % 10)
    assert spans(f"Pay with {wrong}.") == []


@pytest.mark.parametrize(
    "iban",
    [
        "GB82 WEST 1234 5698 7654 32",
        "GB82WEST12345698765432",
        "DE89 3704 0044 0532 0130 00",
        "DE89370400440532013000",
        "FR14 2004 1010 0505 0001 3M02 606",
        "ES91 2100 0418 4502 0005 1332",
        "NL91ABNA0417164300",
        "IT60X0542811101000000123456",
        "NO93 8601 1117 947",
    ],
)
@pytest.mark.parametrize("sentence", ["{}", "IBAN: {}.", "{} BIC DEUTDEFF", "to {} by 3 May"])
def test_ibans(iban: str, sentence: str) -> None:
    assert spans(sentence.format(iban)) == [("iban", iban)]
    assert "iban" not in [kind for kind, _ in spans(sentence.format(iban.replace("1", "3", 1)))]


@pytest.mark.parametrize(
    "address",
    [
        "192.168.1.17",
        "203.0.113.42",
        "10.0.0.1",
        "81.2.69.142",
        "2001:db8:85a3::8a2e:370:7334",
        "2606:4700::1111",
        "fe80::1",
        "fe80::1ff:fe23:4567:890a",
        "2001:0db8:0000:0000:0000:ff00:0042:8329",
    ],
)
@pytest.mark.parametrize("sentence", ["{}", "from {}.", "({})", "inet {}/24", "client={} port=80"])
def test_ip_addresses(address: str, sentence: str) -> None:
    assert spans(sentence.format(address)) == [("ip_address", address)]


@pytest.mark.parametrize(
    "number",
    [
        "123-45-6789",
        "912-90-3456",
        "AB 12 34 56 C",
        "AB123456C",
        "RSSMRA85T10A562S",
        "12345678Z",
        "X1234567L",
        "ABCPE1234F",
        "131052-308T",
        "2 95 10 99 126 111 93",
        "880320-0016",
        "19880320-0016",
        "390.533.447-05",
        "360426199101010071",
        "85.07.30-033.28",
        "756.9217.0769.85",
        "00000000 0 ZZ4",
        "BOXW310820HNERXN09",
        "971013-9019902",
        "770305-02-1234",
        "12.531.909-2",
        "20-05536168-2",
        "34201-0891231-8",
        "1-2345-45678-78-1",
    ],
)
@pytest.mark.parametrize("sentence", ["{}", "It is {}.", "id:{}, born 1985"])
def test_national_ids_by_their_shape(number: str, sentence: str) -> None:
    assert spans(sentence.format(number)) == [("national_id", number)]


@pytest.mark.parametrize(
    ("word", "number"),
    [
        ("SSN", "123456789"),
        ("social security number", "123 45 6789"),
        ("SIN", "130 692 544"),
        ("TFN", "123 456 782"),
        ("BSN", "111222333"),
        ("Steuer-ID", "36574261809"),
        ("PESEL", "44051401359"),
        ("Aadhaar", "2341 2341 2346"),
        ("NHS number", "943 476 5919"),
        ("CNP", "1630615123457"),
        ("CPR", "211062-5629"),
        ("マイナンバー", "6214 9832 0257"),
        ("CPF", "39053344705"),
        ("numéro de sécurité sociale", "295109912611193"),
        ("Kimlik No", "17291716060"),
        ("OIB", "33392005961"),
        ("NIF", "501964843"),
        ("PPSN", "6433435F"),
        ("passport no.", "C01234567"),
    ],
)
def test_national_ids_by_a_word_nearby(word: str, number: str) -> None:
    assert spans(f"{word}: {number}.") == [("national_id", number)]
    assert spans(f"{number} ({word})") == [("national_id", number)]
    assert ("national_id", number) not in spans(f"The count: {number}.")


@pytest.mark.parametrize(
    ("lead", "rest"),
    [
        ("sk-ant-", "api03-" + MIXED[:80]),
        ("sk-", MIXED[:48]),
        ("sk-", "proj-" + MIXED[:60]),
        ("AKIA", "IOSFODNN7EXAMPLE"),
        ("ASIA", "IOSFODNN7EXAMPLE"),
        ("AccountKey=", MIXED[:86] + "=="),
        ("dapi", HEX[:32]),
        ("dop_v1_", HEX),
        ("ghp_", MIXED[:36]),
        ("gho_", MIXED[:36]),
        ("ghs_", MIXED[:36]),
        ("github_pat_", MIXED[:22] + "_" + MIXED[:59]),
        ("glpat-", MIXED[:20]),
        ("AIza", MIXED[:35]),
        ("GOCSPX-", MIXED[:28]),
        ("gsk_", MIXED[:52]),
        ("hf_", MIXED[:34]),
        ("eyJ", "hbGciOiJIUzI1NiJ9.eyJ" + "zdWIiOiIxMjM0NSJ9." + MIXED[:43]),
        ("npm_", MIXED[:36]),
        ("pypi-AgEI", MIXED[:90]),
        ("SG.", MIXED[:22] + "." + MIXED[:43]),
        ("xox", "b-123456789012-" + MIXED[:24]),
        ("sk_", "live_" + MIXED[:24]),
        ("sk_", "test_" + MIXED[:24]),
        ("rk_", "live_" + MIXED[:24]),
        ("SK", HEX[:32]),
    ],
)
@pytest.mark.parametrize("sentence", ["{}", "The key is {} .", 'key("{}")', "KEY={}\n", "密钥{}。"])
def test_keys_of_vendors(lead: str, rest: str, sentence: str) -> None:
    assert spans(sentence.format(lead + rest)) == [("secret", lead + rest)]
    assert spans(f"The key starts with {lead} and goes on.") == []


def test_private_keys() -> None:
    begin, end = (f"-----{word} RSA PRIVATE {'KEY'}-----" for word in ("BEGIN", "END"))
    block = f"{begin}\nProc-Type: 4,ENCRYPTED\n\n{MIXED[:64]}\n{MIXED[:64]}\n{end}"
    assert spans(f"before\n{block}\nafter") == [("secret", block)]
    assert spans(f"{block}\n{block}") == [("secret", block)] * 2
    cut = block[:120]
    assert spans(f"before\n{cut}") == [("secret", cut)]
    assert spans(f"A key file begins with {begin} and ends with {end}.") == []
    assert spans(block.replace("PRIVATE", "PUBLIC")) == []


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        ('password = "Tr0ub4dor&3"', "Tr0ub4dor&3"),
        ("DB_PASSWORD=xK9mP2vLq8Rt", "xK9mP2vLq8Rt"),
        ("Your password is: xK9mP2vLq8Rt.", "xK9mP2vLq8Rt"),
        ('{"api_key": "9f8e7d6c5b4a39281706f5e4d3c2b1a0"}', "9f8e7d6c5b4a39281706f5e4d3c2b1a0"),
        ("client_secret: 7Fj2kD93mXpQ1zVb8WnR", "7Fj2kD93mXpQ1zVb8WnR"),
        ("aws_secret_access_key = wJa1rXUtnF3EMIK7MDENG+bPxRfiCY", "wJa1rXUtnF3EMIK7MDENG+bPxRfiCY"),
        ("Authorization: Bearer 7Fj2kD93mXpQ1zVb8WnR", "7Fj2kD93mXpQ1zVb8WnR"),
        ("postgres://bob:s3cretpw@db.example.com/app", "s3cretpw"),
    ],
)
def test_secrets_by_their_name(text: str, secret: str) -> None:
    assert spans(text) == [("secret", secret)]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "An ordinary sentence with nothing to hide.",
        "THE QUICK BROWN FOX JUMPS OVER THE LAZY DOG",
        # Dates and times.
        "2024-01-15",
        "2024-01-15T12:30:45.123456Z",
        "20240115123045",
        "15/01/2024 and 01.02.2024 and 01-02-2024",
        "01 02 2024 12",
        "at 12:30:45, 09:15-10:45",
        "1914-1918, 1939-1945",
        "2001 2002 2003 2004",
        "2001-2002-2003",
        "1700000000 and 1700000000000",
        # Sums, prices and measures.
        "48/2 = <<48/2=24>>24 clips",
        "$1,000,000 or $1000000.00, €12.345.678,90",
        "3.14159265358979323846",
        "0.4111111111111111 and 4111111111111111.5",
        "1234567890",
        "12345678901234567890",
        "123456789 is divisible by 9",
        "1,234,567,890 people",
        "x = 100 + 200 - 300 * 400 / 500",
        "5 + 10000000 = 10000005, 2+12345678",
        "1.5e+12345678",
        "100 200 300 400 500 600",
        "200 300 4000 500",
        "sin 130692544 and cos 130692544",
        "a 415 555 2671 8 row",
        "0 1 1 2 3 5 8 13 21 34 55 89",
        "987-654 and 12-34-56",
        "-123456789 < 0",
        "329-494.4458 and 134598041806069610",
        "10.5 20.25 30.125",
        "50-60-70%",
        # Numbers of other things.
        "Order #12345678, order #415-555-2671",
        "ISBN 978-0-306-40615-7, ISBN 0-306-40615-2, ISBN 9780306406157",
        "ISSN 0317-8471",
        "ZIP 94107-1234 and 01234-5678",
        "doi:10.1000/182.4567890",
        "arXiv:2106.09685",
        "https://example.com/items/415-555-2671/4111111111111111",
        "RFC 2616, section 14.35.1.2",
        "000-12-3456, 666-12-3456, 123-00-4567",
        "550e8400-e29b-41d4-a716-446655440000",
        "12345678-1234-1234-1234-123456789012",
        "da39a3ee5e6b4b0d3255bfef95601890afd80709",
        "1234567890123456789012345678901234567890",
        "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
        "00:1A:2B:3C:4D:5E, 00-1A-2B-3C-4D-5E",
        "GPT4, H2SO4, COVID19, A1B2C3D4E5",
        "FREQ: 1.2.3, CUDA 12.4.1, v1.22.33.44, version 1.22.33.44, 1.2.3.4",
        # Addresses that are nobody's, and what only looks like one.
        "127.0.0.1, 0.0.0.0, 255.255.255.0, 224.0.0.1, 8.8.8.8",
        "::1 and :: and [::1]:8080",
        "256.300.1.1, 1.2.3.4.5, 10.20.30.40.50",
        "std::vector<int> a::b dead::beef x[1::2] x[2000::2] 12:30:45",
        "@mention, hello @ world, user@localhost, @types/node, @app.route",
        "git@github.com:owner/name.git, icon@2x.png, lodash@4.17.21",
        "y = x@w.T + a@self.weight + q@k.transpose(1, 2)",
        # What only looks like a secret.
        'password = "your_password_here"',
        "password: correct horse battery staple",
        "api_key = os.environ['API_KEY']",
        "token = get_token_2024_from_store(user1)",
        'api_key="YOUR_API_KEY", token=${TOKEN}, secret: <SECRET>',
        "http://user:password@localhost:8080",
        "OS-release     : 5.10.102.1",
        "password=password, pwd=/home/user/projects/2024/app",
        "pad_token='<|endoftext|>', max_tokens=4096, num_tokens: 1234567890",
        "a task-oriented risk-adjusted sk-learn pipeline in scikit-learn",
        "self.hf_hub_download, npm_config_registry, gsk_, ghp_xxxx",
        "eyJhbGciOiJIUzI1NiJ9",
        "http://localhost:8080/a@b",
        "naïve café 😀 \ud83d ١٢٣-٤٥-٦٧٨٩",
    ],
)
def test_what_passes(text: str) -> None:
    assert spans(text) == []


def test_the_more_specific_of_two_stays() -> None:
    url = "postgres://bob:" + "s3cretpw@db.example.com"
    assert spans(url) == [("secret", "s3cretpw")]  # not the address "s3cretpw@db.example.com"
    assert spans("Aadhaar 4111 1111 1111 1111") == [("card", "4111 1111 1111 1111")]
    assert spans("phone: 912-90-3456") == [("national_id", "912-90-3456")]


PIECES = [
    ("Mail jane@example.com", "Mail [EMAIL]"),
    ("😀 (415) 555-2671", "😀 [PHONE]"),
    ("card 4111 1111 1111 1111", "card [CARD]"),
    ("GB82 WEST 1234 5698 7654 32", "[IBAN]"),
    ("from 203.0.113.42", "from [IP_ADDRESS]"),
    ("SSN 123-45-6789", "SSN [NATIONAL_ID]"),
    ("api_key=9f8e7d6c5b4a39281706f5e4d3c2b1a0", "api_key=[SECRET]"),
    ("nothing at all", "nothing at all"),
]


def test_redaction_replaces_each_span_and_leaves_nothing_to_find() -> None:
    text, wanted = ("; ".join(side) for side in zip(*PIECES))
    redacted = redact(text, find(text))
    assert redacted == wanted
    assert find(redacted) == []
    assert {finding.kind for finding in find(text)} == set(KINDS)
    assert redact(text, []) == text
    assert redact("ab", [Finding("card", 0, 1), Finding("iban", 1, 2)]) == "[CARD][IBAN]"


def test_findings_are_sorted_and_apart_whatever_stands_together() -> None:
    rng = random.Random(0)
    for _ in range(300):
        text = rng.choice(["", " ", "-", ": ", "\n"]).join(rng.choice(PIECES)[0] for _ in range(8))
        places = [place for finding in find(text) for place in (finding.start, finding.end)]
        assert places == sorted(places)
        assert all(finding.kind in KINDS and finding.start < finding.end for finding in find(text))


@pytest.mark.parametrize(
    "piece",
    [
        "a@b.co ",
        "a@",
        "@a.",
        "1 ",
        "A1-",
        "4111 ",
        "+1",
        "(0",
        "1.1.",
        "::",
        "12ab:",
        "-eyJ",
        "-----BEGIN ",
        "token=",
        "://a:1",
    ],
)
def test_a_long_text_takes_time_in_proportion(piece: str) -> None:
    started = time.process_time()
    find(piece * 30_000)
    assert time.process_time() - started < 10  # a tenth of a second; minutes, were it quadratic


def test_the_libraries_are_loaded_only_for_a_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] in ("phonenumbers", "stdnum")]:
        monkeypatch.delitem(sys.modules, name)
    find("In 2024 we sold 1,250 of 3,000 units at $19.99 each; see https://example.com or write to jane@example.com.")
    assert not {"phonenumbers", "stdnum"} & set(sys.modules)
