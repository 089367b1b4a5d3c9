"""Who may reach the server, from where, and what HTTP asks of every path."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from dgemma.cli import main
from dgemma.server.access import api_keys
from dgemma.server.run import served_names
from support.serving import KEY, own_connections, running

ORIGIN = "http://localhost:3000"


@pytest.fixture(scope="module")
def opened(tiny_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A server with two keys, another name, and a page elsewhere that may ask."""
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text("# of the team\nfirst-key\n\n  second-key \n")
    options = ("--api-key-file", keys, "--allowed-host", "Box.lan", "--cors-origin", ORIGIN)
    with (
        running(tiny_gguf, *options) as (address, _),
        httpx.Client(base_url=address, timeout=60, trust_env=False) as http,
    ):
        yield http


# ---- Names and keys ------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["first-key", "second-key"])
@pytest.mark.parametrize("form", ["bearer", "x-api-key", "password"])
def test_each_key_opens(opened: httpx.Client, key: str, form: str) -> None:
    headers = {"bearer": {"Authorization": f"Bearer {key}"}, "x-api-key": {"X-Api-Key": key}}
    auth = ("", key) if form == "password" else None
    assert opened.get("/props", headers=headers.get(form, {}), auth=auth).status_code == 200


def test_a_wrong_key_is_an_authentication_error(opened: httpx.Client) -> None:
    for headers in ({}, {"X-Api-Key": "# of the team"}, {"Authorization": "Bearer"}):
        answer = opened.get("/props", headers=headers)
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "invalid_api_key"
        assert answer.json()["error"]["type"] == "authentication_error"


@pytest.mark.parametrize(
    ("name", "status"),
    [
        ("localhost", 200),
        ("127.0.0.1:1234", 200),
        ("[::1]:80", 200),
        ("host.docker.internal:8080", 200),
        ("BOX.lan", 200),
        ("attacker.example", 403),
        ("localhost.attacker.example", 403),
        ("", 403),
    ],
)
def test_names(opened: httpx.Client, name: str, status: int) -> None:
    headers = {"Host": name, "Authorization": "Bearer first-key"}
    answer = opened.get("/props", headers=headers)
    assert answer.status_code == status
    if status == 403:
        error = answer.json()["error"]
        assert "--allowed-host" in error["message"]
        assert error["type"] == "invalid_request_error"


def test_names_that_are_served() -> None:
    assert served_names("0.0.0.0", []) is None
    assert served_names("127.0.0.1", ["*"]) is None
    own = {"127.0.0.1", "localhost", "[::1]", "host.docker.internal"}
    assert served_names("127.0.0.1", []) == own
    assert served_names("::1", ["Box.lan"]) == own | {"box.lan"}
    assert served_names("0.0.0.0", ["box.lan"]) == own | {"0.0.0.0", "box.lan"}


@pytest.mark.parametrize("key", ["", " "])
def test_an_empty_key_opens_no_server(
    tiny_gguf: Path, key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "-m", str(tiny_gguf), "--api-key", key]) == 1
    assert "--api-key is empty" in capsys.readouterr().err


def test_a_file_without_keys_opens_no_server(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("# none yet\n")
    with pytest.raises(ValueError, match="has no key"):
        api_keys(None, str(tmp_path / "keys"))
    (tmp_path / "keys").write_text("b\n")
    assert api_keys(["a"], str(tmp_path / "keys")) == ["a", "b"]
    assert api_keys(None, None) == []


@pytest.mark.parametrize("port", [-1, 65536, 2**40])
def test_a_port_that_is_none(
    tiny_gguf: Path, port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["serve", "-m", str(tiny_gguf), "--port", str(port)])
    assert ended.value.code == 2
    assert f"{port} is out of range: expected 0 to 65535" in capsys.readouterr().err


def test_open_to_the_world_without_a_key_is_warned_of(tiny_gguf: Path) -> None:
    with running(tiny_gguf, "--host", "0.0.0.0") as (_, process):
        pass
    assert process.returncode == 0
    assert "without a key" in process.said  # type: ignore[attr-defined]
    with running(tiny_gguf, "--host", "0.0.0.0", "--api-key", KEY) as (_, process):
        pass
    assert "without a key" not in process.said  # type: ignore[attr-defined]


# ---- Pages of other sites ------------------------------------------------------------------------


def test_a_page_that_may_ask(opened: httpx.Client) -> None:
    asks = {"Origin": ORIGIN, "Access-Control-Request-Method": "POST"}
    wants = {**asks, "Access-Control-Request-Headers": "authorization,content-type"}
    preflight = opened.options("/v1/chat/completions", headers=wants)
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == ORIGIN
    assert "authorization" in preflight.headers["access-control-allow-headers"]
    assert "access-control-allow-credentials" not in preflight.headers
    headers = {"Origin": ORIGIN, "Authorization": "Bearer first-key"}
    answer = opened.get("/v1/models", headers=headers)
    assert answer.headers["access-control-allow-origin"] == ORIGIN
    # Errors too: a page that cannot read them cannot tell what is wrong.
    refused = opened.get("/v1/models", headers={"Origin": ORIGIN})
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == ORIGIN


def test_a_page_that_may_not(opened: httpx.Client) -> None:
    headers = {"Origin": "https://attacker.example", "Authorization": "Bearer first-key"}
    assert "access-control-allow-origin" not in opened.get("/v1/models", headers=headers).headers
    asks = {**headers, "Access-Control-Request-Method": "POST"}
    assert opened.options("/v1/chat/completions", headers=asks).status_code == 400


# ---- Methods and paths ---------------------------------------------------------------------------

METHODS = {
    "/": "GET, HEAD, OPTIONS",
    "/health": "GET, HEAD, OPTIONS",
    "/v1/models": "GET, HEAD, OPTIONS",
    "/v1/models/tiny": "GET, HEAD, OPTIONS",
    "/v1/chat/completions": "OPTIONS, POST",
    "/chat/completions": "OPTIONS, POST",
    "/tokenize": "OPTIONS, POST",
}


@pytest.mark.parametrize("path", METHODS)
def test_methods(http: httpx.Client, path: str) -> None:
    told = http.options(path)
    assert told.status_code == 204
    assert told.headers["allow"] == METHODS[path]
    wrong = http.delete(path)
    assert wrong.status_code == 405
    assert wrong.headers["allow"] == METHODS[path]
    if "GET" in METHODS[path]:
        whole, head = http.get(path), http.head(path)
        assert head.status_code == 200
        assert head.content == b""
        assert head.headers["content-length"] == str(len(whole.content))


def test_a_path_that_there_is_not_names_those_there_are(http: httpx.Client) -> None:
    answer = http.post("/v1/chat/completion", json={})
    assert answer.status_code == 404
    message = answer.json()["error"]["message"]
    assert "did you mean /v1/chat/completions?" in message
    for path in ("/v1/models", "/health", "/tokenize", "/v1/completions"):
        assert path in message
    assert http.options("/nowhere").status_code == 404


def test_requests_have_ids(http: httpx.Client) -> None:
    ids = {http.get("/health").headers["x-request-id"] for _ in range(3)}
    assert len(ids) == 3
    own = http.get("/health", headers={"X-Request-ID": "abc123"})
    assert own.headers["x-request-id"] == "abc123"
    dashed = http.get("/health", headers={"X-Request-ID": "7f-3_a"})
    assert dashed.headers["x-request-id"] == "7f-3_a"


@own_connections
def test_what_is_no_id_is_not_repeated(http: httpx.Client) -> None:
    odd = http.get("/health", headers={"X-Request-ID": "a: b"})
    assert odd.headers["x-request-id"] != "a: b"


def test_the_model_by_its_name(http: httpx.Client) -> None:
    (entry,) = http.get("/v1/models").json()["data"]
    assert http.get("/v1/models/tiny").json() == entry == http.get("/models/tiny").json()
    assert entry["context_length"] == entry["max_model_len"] == entry["meta"]["n_ctx"] == 512
    wrong = http.get("/v1/models/org/other")
    assert wrong.status_code == 404
    assert wrong.json()["error"]["code"] == "model_not_found"
    assert "'org/other'" in wrong.json()["error"]["message"]


def test_the_api_describes_itself(http: httpx.Client) -> None:
    page = http.get("/openapi.json").json()
    assert {"/v1/chat/completions", "/v1/completions", "/tokenize"} <= set(page["paths"])
    body = page["paths"]["/v1/chat/completions"]["post"]["requestBody"]
    schema = body["content"]["application/json"]["schema"]
    assert schema["required"] == ["messages"]
    assert "temperature" in schema["properties"]
