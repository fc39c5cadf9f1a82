"""The network is cut in every process the tests start, loopback apart; real images are found, or missed by name."""

import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ABROAD = "192.0.2.1"  # a documentation address (RFC 5737): no machine ever has it

PROBE = textwrap.dedent(
    f"""
    import os, socket
    for reach in (
        lambda: socket.create_connection(("{ABROAD}", 80), timeout=1),
        lambda: socket.getaddrinfo("example.org", 443),
        lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("{ABROAD}", 53)),
    ):
        try:
            reach()
        except OSError as error:
            assert type(error).__name__ == "NetworkIsCut", repr(error)
        else:
            raise SystemExit("reached another machine")
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    print("cut", os.environ.get("RANK", "-"))
    """
)


def run_python(*arguments: str, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], env=env, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_this_process_has_no_network_but_loopback() -> None:
    with pytest.raises(OSError, match="without network"):
        socket.create_connection((ABROAD, 80), timeout=1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname(), timeout=5).close()
        socket.create_connection(("localhost", server.getsockname()[1]), timeout=5).close()


@pytest.mark.parametrize("environment", ["inherited", "child_env", "elsewhere_env"])
def test_a_child_and_its_child_have_no_network(environment: str, request: pytest.FixtureRequest) -> None:
    env = None if environment == "inherited" else request.getfixturevalue(environment)
    assert run_python("-c", PROBE, env=env).split() == ["cut", "-"]
    nested = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {PROBE!r}], check=True)"
    assert run_python("-c", nested, env=env).split() == ["cut", "-"]


def test_ranks_have_no_network(tmp_path: Path) -> None:
    (tmp_path / "probe.py").write_text(PROBE)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(tmp_path / "probe.py"))
    said = run_python(*launcher)  # the ranks write at the same time, in the middle of each other's lines
    assert said.count("cut") == 2 and sorted(filter(str.isdigit, said)) == ["0", "1"]


def test_a_child_whose_environment_loses_the_cut_is_refused() -> None:
    with pytest.raises(AssertionError, match="tests/offline"):
        run_python("-c", "pass", env={"PATH": "/usr/bin"})


def test_real_images_unset_skip_and_broken_fail(tmp_path: Path, child_env: dict[str, str], repository: Path) -> None:
    probe = repository / "tests" / "offline" / "realdata_probe.py"

    def outcome(named: str) -> str:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(probe)]
        env = {**child_env, "PIXELLM_REALDATA": named}
        return subprocess.run(command, env=env, capture_output=True, text=True, cwd=repository, timeout=120).stdout

    skipped = outcome("")
    assert "1 skipped" in skipped and "PIXELLM_REALDATA is not set" in skipped
    assert "there is no dataset, weights, reference, expected.json in it" in outcome(str(tmp_path / "nowhere"))
    for name in ("dataset", "weights", "reference"):
        (tmp_path / name).mkdir()
    (tmp_path / "expected.json").write_text("{")
    assert "expected.json cannot be read" in outcome(str(tmp_path))
    (tmp_path / "expected.json").write_text("{}")
    assert "1 passed" in outcome(str(tmp_path))
