"""What `make install` takes: locked to the byte, for the torch and the CUDA that are there."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import kvferry
from kvferry.engine.cpu.compiler import SETS, NativeUnavailable, find_compiler, try_out

ROOT = Path(kvferry.__file__).resolve().parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCKS = {path.stem: path.read_text() for path in (ROOT / "setup").glob("*.lock")}


def load(name: str) -> ModuleType:
    """A script of the folder that no package holds."""
    spec = importlib.util.spec_from_file_location(f"kvferry_setup_{name}", ROOT / "setup" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and named tuples look there
    spec.loader.exec_module(module)
    return module


install = load("install")


def names(lock: str) -> set[str]:
    found = re.findall(r"^([A-Za-z0-9][\w.-]*)(?:\[.*?\])?==", LOCKS[lock], re.MULTILINE)
    return {name.lower().replace("_", "-").replace(".", "-") for name in found}


def normalized(requirement: str) -> str:
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert match is not None
    return re.sub(r"[-_.]+", "-", match[0]).lower()


def test_every_line_is_pinned_and_has_hashes_and_names_no_index() -> None:
    for name, text in LOCKS.items():
        for block in re.split(r"\n(?=[A-Za-z0-9])", text.partition("\n")[2].strip()):
            assert re.match(r"[A-Za-z0-9][\w.\[\]-]*==\S+", block), (name, block)
            assert re.search(r"--hash=sha256:[0-9a-f]{64}", block), (name, block)
        assert "://" not in text and "--index" not in text, name


def test_what_is_declared_is_locked_and_a_server_gets_no_test_clients() -> None:
    base = {normalized(each) for each in PROJECT["dependencies"]}
    assert base - names("serve") == {"torch", "nixl-cu12"}
    extras = {name: {normalized(each) for each in PROJECT["optional-dependencies"][name]} for name in ("gpu", "dev")}
    assert extras["gpu"] <= names("gpu")
    assert extras["dev"] <= names("dev") | names("serve")
    assert {"ray", "ucxx-cu12", "httpx", "matplotlib"} <= names("dev")
    assert names("serve").isdisjoint({"matplotlib", "httpx", "torch", "pytest", "ray", "nixl-cu12", "nixl-cu13"})
    assert not [name for name in names("serve") if name.startswith("nvidia")]


def test_pins_of_the_constraints_are_those_of_the_locks() -> None:
    together = "\n".join(LOCKS.values())
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line and line[0] != "#"]
    for pin in pins:
        name, _, version = pin.partition("==")
        spelled = "[-_.]".join(map(re.escape, re.split("[-_.]", name)))
        assert re.search(rf"^{spelled}=={re.escape(version)}\b", together, re.MULTILINE | re.IGNORECASE), pin


@pytest.mark.parametrize(
    ("cuda", "nixl"), [(None, "nixl-cu12"), ("12.8", "nixl-cu12"), ("13.0", "nixl-cu13"), ("13.2", "nixl-cu13")]
)
def test_nixl_is_that_of_torchs_cuda(cuda: str | None, nixl: str) -> None:
    torch = install.Torch("2.13.0", cuda, "/site-packages")
    assert install.names_of_locks(torch, has_gpu=False, is_dev=False) == ["serve", nixl, "model"]
    bare = install.names_of_locks(torch, has_gpu=False, is_dev=False, has_compiler=False)
    assert bare == ["serve", nixl, "model", "zig"]
    flashinfer = ["gpu"] if cuda is not None else []  # a card is of no use to a torch for CPU
    assert install.names_of_locks(torch, has_gpu=True, is_dev=True) == ["serve", nixl, "model", *flashinfer, "dev"]


@pytest.mark.parametrize(
    ("ages", "is_enough"),
    [(("old", None), False), (("old", "new"), True), (("new", None), True), ((None, None), False)],
)
def test_a_compiler_of_an_older_language_is_none(
    ages: tuple[str | None, str | None], is_enough: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several long-lived systems have GCC 8 to 10 as `c++`."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(install.platform, "machine", lambda: "x86_64")
    for name, age in zip(("c++", "clang++"), ages, strict=True):
        if age is not None:
            (tmp_path / name).write_text(f"#!/bin/sh\nexit {int(age == 'old')}\n")
            (tmp_path / name).chmod(0o755)
    assert install.has_compiler() == is_enough


def test_a_compiler_without_a_library_to_link_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the compiler is installed and the package of its C++ library is not."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(install.platform, "machine", lambda: "x86_64")
    stand_in = tmp_path / "c++"
    for text, is_enough in (
        ('case " $* " in *" -c "* | *" -fsyntax-only "*) exit 0;; *) exit 1;; esac', False),  # it compiles alone
        ('case " $* " in *" -static"*) exit 1;; *) exit 0;; esac', True),  # of a package with the shared library alone
    ):
        stand_in.write_text(f"#!/bin/sh\n{text}\n")
        stand_in.chmod(0o755)
        assert install.has_compiler() == is_enough


def test_the_compiler_of_this_machine_is_found_where_kvferry_uses_it() -> None:
    try:
        command = find_compiler()
        try_out(next(iter(SETS)), command)
    except NativeUnavailable as reason:
        pytest.skip(f"no native code on this machine: {reason}")
    if len(command) > 1:
        pytest.skip("zig alone is here, which is what a machine without a compiler is given")
    assert install.has_compiler()


@pytest.mark.slow
def test_the_torch_of_an_environment_is_seen_from_one_that_is_made_in_it(tmp_path: Path) -> None:
    """`--system-site-packages` alone shows the packages of the interpreter that the first one was made with."""
    base = tmp_path / "base"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(base)], check=True)
    [packages] = (base / "lib").glob("python*/site-packages")
    (packages / "torch").mkdir()
    (packages / "torch" / "__init__.py").write_text("from . import version\n__version__ = version.__version__\n")
    (packages / "torch" / "version.py").write_text('__version__ = "2.13.0+cu130"\ncuda: str | None = "13.0"\n')
    python = str(base / "bin" / "python")
    program = (
        "import runpy, sys; from pathlib import Path; "
        "i = runpy.run_path(sys.argv[1]); torch = i['find_torch'](sys.executable); "
        "i['make_venv'](Path(sys.argv[2]), torch); print(i['find_torch'](sys.argv[2] + '/bin/python'))"
    )
    arguments = [python, "-c", program, str(ROOT / "setup" / "install.py"), str(tmp_path / "venv")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert f"Torch(version='2.13.0+cu130', cuda='13.0', folder='{packages}')" in done.stdout


@pytest.mark.slow
def test_an_environment_that_was_left_half_made_is_completed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Python links itself into an environment before it puts pip there, whose metadata come last."""
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    [packages] = (venv / "lib").glob("python*/site-packages")
    (packages / "pip").mkdir()
    (packages / "pip" / "__init__.py").touch()
    (packages / "own.py").write_text("kept = True\n")
    assert not install.has_pip(venv / "bin" / "python")
    install.make_venv(venv, None)
    assert "completing it" in capsys.readouterr().out
    program = "import own, pip; from importlib.metadata import version; assert own.kept and version('pip')"
    subprocess.run([venv / "bin" / "python", "-m", "pip", "--version"], check=True)
    subprocess.run([venv / "bin" / "python", "-c", program], check=True)
    install.make_venv(venv, None)
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_an_environment_whose_python_is_gone_gets_another_one(tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    for link in (venv / "bin").glob("python*"):
        link.unlink()
        link.symlink_to("/gone/bin/python")
    install.make_venv(venv, None)
    assert install.has_pip(venv / "bin" / "python")


def test_where_no_pip_can_be_had_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Debian's Python makes environments without one until python3-venv is installed."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\nmkdir -p "$3/bin" && ln -sf /bin/false "$3/bin/python"\n')
    python.chmod(0o755)
    monkeypatch.setattr(install.sys, "executable", str(python))
    for _ in range(2):
        with pytest.raises(SystemExit, match=r"no environment with pip could be made .*: apt install python3-venv"):
            install.make_venv(tmp_path / "venv", None)


def test_where_nothing_can_be_written_it_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match=r"file/venv cannot be made or written to: Not a directory: install from a"):
        install.make_venv(tmp_path / "file" / "venv", None)


def test_packages_come_into_the_environment_also_where_pip_is_set_up_for_a_users_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`user = true` in pip.conf: pip refuses that in an environment."""
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python"
    python.write_text(f"#!/bin/sh\necho $PIP_USER > '{tmp_path}/said'\n")
    python.chmod(0o755)
    monkeypatch.setenv("PIP_USER", "1")
    install.Installer(tmp_path).lock("model")
    assert (tmp_path / "said").read_text() == "0\n"


def test_a_driver_that_hangs_ends_no_installation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nexec sleep 60\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(install, "_GPU_TIMEOUT_S", 0.1)
    assert not install.has_gpu()
    assert "no FlashInfer: nvidia-smi is silent" in capsys.readouterr().out


class Checkout:
    """Runs `make` with an interpreter that only notes what it was to install."""

    def __init__(self, folder: Path) -> None:
        self._venv, self._notes = folder / "venv", folder / "notes"
        (self._venv / "bin").mkdir(parents=True)
        self._python = folder / "python"
        self._python.write_text(
            f'#!/bin/sh\nif [ "$1" = -c ]; then exec {sys.executable} -c "import sys; $AGE; $2"; fi\n'
            f"echo $* >> {self._notes}\n"
        )
        self._python.chmod(0o755)
        self.upgrade("3.11.2")

    def upgrade(self, version: str) -> None:
        python = self._venv / "bin" / "python"
        python.write_text(f"#!/bin/sh\necho $NOISE >&2\necho Python {version}\n")
        python.chmod(0o755)

    def move_from(self, place: str) -> None:
        for marker in (found := sorted(self._venv.glob(".installed*"))):
            marker.write_text(marker.read_text().replace(str(ROOT), place))
        assert found

    def make(self, *targets: str, age: str = "pass", noise: str = "") -> tuple[int, str]:
        """Return whether it failed, and what was installed or said of it."""
        self._notes.write_text("")
        make = ["make", "-s", "-C", str(ROOT), *targets, f"VENV={self._venv}", f"PYTHON={self._python}"]
        env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
        env |= {"AGE": age, "NOISE": noise}
        done = subprocess.run(make, env=env, capture_output=True, text=True, check=False)
        return done.returncode, self._notes.read_text().replace(str(self._venv), "VENV").strip() or done.stderr.strip()


def test_what_a_moved_folder_or_another_python_spoiled_is_installed_anew(tmp_path: Path) -> None:
    """Scripts name the folder that they were made in, and packages lie in a folder of one version's."""
    checkout = Checkout(tmp_path)
    plain = (0, "setup/install.py --venv VENV")
    assert [checkout.make("install") for _ in range(2)] == [plain, (0, "")]
    checkout.move_from("/where/it/was")
    assert [checkout.make("install") for _ in range(2)] == [plain, (0, "")]
    assert [checkout.make("install-dev") for _ in range(2)] == [(0, f"{plain[1]} --dev"), (0, "")]
    assert checkout.make("install") == (0, "")
    checkout.upgrade("3.13.1")
    assert [checkout.make("install-dev") for _ in range(2)] == [(0, f"{plain[1]} --dev"), (0, "")]


def test_what_an_interpreter_complains_of_is_no_other_python(tmp_path: Path) -> None:
    """As of an LD_PRELOAD that names no library: one terminal has it, another one has not."""
    checkout = Checkout(tmp_path)
    assert checkout.make("install", noise="cannot be preloaded") == (0, "setup/install.py --venv VENV")
    assert checkout.make("install") == (0, "")


def test_two_targets_do_not_install_at_once(tmp_path: Path) -> None:
    assert Checkout(tmp_path).make("-j2", "install-dev", "install") == (0, "setup/install.py --venv VENV --dev")


def test_what_may_not_be_changed_is_used_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkout = Checkout(tmp_path)
    checkout.make("install")
    checkout.move_from("/where/it/was")
    (tmp_path / "rm").write_text("#!/bin/sh\necho Read-only file system >&2\nexit 1\n")  # root may delete elsewhere
    (tmp_path / "rm").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    said = f"{tmp_path}/venv may not be changed, and was installed for /where/it/was, Python 3.11.2"
    assert checkout.make("install") == (0, said)


def test_an_old_python_is_told_before_it_reads_what_it_does_not_understand(tmp_path: Path) -> None:
    code, said = Checkout(tmp_path).make("install", age="sys.version_info = (3, 6, 8)")
    assert code != 0
    assert said.startswith("kvferry needs Python 3.11 or newer: make install PYTHON=python3.12\n")


@pytest.mark.parametrize(
    ("arguments", "given", "folder"),
    [
        ("", {}, "~/.local/share/kvferry"),  # which is read as in any setting, also where HOME is not set
        ("--port 8001", {"XDG_DATA_HOME": "/data"}, "/data/kvferry"),
        ("--port 8001", {"XDG_DATA_HOME": "data"}, "~/.local/share/kvferry"),  # none, as the standard has it
        ("--port 8001", {"KVFERRY_DATA_DIR": "/own"}, "/own"),
        ("--config=f.yaml", {"KVFERRY_DATA_DIR": "/own"}, "/own"),
        ("MODEL --config f.yaml", {}, "none"),
        ("--config=f.yaml", {}, "none"),
    ],
)
def test_make_serve_names_a_folder_for_data_where_no_file_of_settings_may(
    tmp_path: Path, arguments: str, given: dict[str, str], folder: str
) -> None:
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "kvferry"
    command.write_text('#!/bin/sh\necho "${KVFERRY_DATA_DIR-none}" "$@"\n')
    command.chmod(0o755)
    (tmp_path / ".installed").touch()
    env = {name: value for name, value in os.environ.items() if not name.startswith(("KVFERRY_", "XDG_", "MAKE"))}
    env |= given
    make = ["make", "-s", "-C", str(ROOT), "serve", f"VENV={tmp_path}", f"ARGS={arguments}"]
    done = subprocess.run(make, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [folder, "serve", *arguments.split()]


def test_what_torch_was_built_for_is_read_from_its_files(tmp_path: Path) -> None:
    folder = tmp_path / "lib/python3.11/site-packages/torch"
    folder.mkdir(parents=True)
    text = (
        "from typing import Optional\n__version__ = '2.13.0+cpu'\ncuda: Optional[str] = {}\nhip: Optional[str] = None\n"
    )
    for value, cuda in (("None", None), ("'13.0'", "13.0")):
        (folder / "version.py").write_text(text.format(value))
        assert install.torch_of_files(tmp_path)[:2] == ("2.13.0+cpu", cuda)
