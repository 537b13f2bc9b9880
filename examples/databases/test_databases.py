"""Each test finds both databases as the fixtures left them, whatever the tests before it have done."""

from __future__ import annotations

import pytest
from servers import Postgres, Redis


def test_selling_everything(postgres: Postgres) -> None:
    assert postgres.sql("select sum(number) from stock") == ["12"]
    postgres.sql("delete from stock")
    assert postgres.sql("select count(*) from stock") == ["0"]


def test_the_stock_is_there_again(postgres: Postgres) -> None:
    assert postgres.sql("select item from stock order by item") == ["apples", "pears"]
    postgres.sql("drop table stock")


def test_a_table_of_the_same_name(postgres: Postgres) -> None:
    with pytest.raises(AssertionError, match="already exists"):
        postgres.sql("create table stock (x int)")


def test_counting(redis: Redis) -> None:
    assert redis("INCR", "visits") == ":11"
    assert redis("FLUSHALL") == "+OK"


def test_counting_again(redis: Redis) -> None:
    assert redis("INCR", "visits") == ":11"
    assert redis("GET", "visits") == "11"
