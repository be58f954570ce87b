"""Which database and which driver a ``db+`` URL means."""

from pathlib import Path

import pytest

from aqueue import results as stores
from aqueue.drivers.sql_address import SqlAddress
from aqueue.errors import ConfigurationError
from aqueue.url import Url


@pytest.mark.parametrize(
    ("given", "driver"),
    [
        ("db+sqlite:///db.sqlite3", "sqlite+aiosqlite"),
        ("db+sqlite+pysqlite:////tmp/db.sqlite3", "sqlite+aiosqlite"),
        ("db+postgresql://u:p@h/d", "postgresql+asyncpg"),
        ("db+postgresql+psycopg2://u:p@h:5432/d", "postgresql+asyncpg"),
        ("db+postgresql+psycopg://u:p@h/d", "postgresql+asyncpg"),
        ("db+mysql://u:p@h/d", "mysql+asyncmy"),
        ("db+mysql+pymysql://u:p@h/d?charset=utf8mb4", "mysql+asyncmy"),
        ("db+mysql+mysqldb://u:p@h/d", "mysql+asyncmy"),
        ("db+mariadb://u:p@h/d", "mariadb+asyncmy"),
        ("db+mariadb+mariadbconnector://u:p@h/d", "mariadb+asyncmy"),
    ],
)
def test_a_blocking_driver_is_replaced(given: str, driver: str) -> None:
    engine = SqlAddress(Url(given)).engine(1.0)
    assert f"{engine.dialect.name}+{engine.dialect.driver}" == driver.replace("mariadb", engine.dialect.name)
    stores.from_url(Url(given))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("db+sqlite://", "names no file"),
        ("db+sqlite:///:memory:", "names no file"),
        ("db+sqlite:///a.db?mode=ro", "mode; known are timeout"),
        ("db+mysql://u:s3cret@h/d?compress=true", "compress; known are charset"),
        ("db+mysql://u:s3cret@h/d?ssl_ca=/nowhere/ca.pem", "No such file"),
        ("db+postgresql://u:s3cret@h:port/d", "bad database URL"),
        ("db+oracle://u:s3cret@h/d", "no result store for db\\+oracle://"),
    ],
)
def test_what_can_not_work_is_refused_without_the_password(given: str, told: str) -> None:
    with pytest.raises(ConfigurationError, match=told) as caught:
        stores.from_url(Url(given))
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "module", "extra"),
    [
        ("db+sqlite:///a.db", "aiosqlite", "sqlalchemy"),
        ("db+postgresql://u:s3cret@h/d", "asyncpg", "postgresql"),
        ("db+mysql://u:s3cret@h/d", "asyncmy", "mysql"),
        ("db+mariadb://u:s3cret@h/d", "asyncmy", "mysql"),
    ],
)
def test_a_missing_driver_is_told_with_the_extra_that_brings_it(
    given: str, module: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / f"{module}.py").write_text("raise ImportError('not installed')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(__import__("sys").modules, module, raising=False)
    with pytest.raises(ConfigurationError, match=rf"pip install 'aqueue\[{extra}\]'") as caught:
        stores.from_url(Url(given))
    assert "s3cret" not in str(caught.value)


def test_parameters_of_libpq_reach_the_driver() -> None:
    address = SqlAddress(Url("db+postgresql://u:p@h/d?sslmode=require&connect_timeout=3&application_name=shop"))
    assert str(address) == "db+postgresql://u:***@h/d?sslmode=require&connect_timeout=3&application_name=shop"
    address.engine(1.0)
