import logging

import pytest

from nowag_pl.kernels import dispatch


@pytest.mark.parametrize(("name", "command"), [("numba", "pip install numba"), ("triton", "pip install triton")])
def test_a_missing_package_is_named_once(name, command, monkeypatch, caplog):
    monkeypatch.setattr(dispatch, "find_spec", lambda name: None)
    dispatch.has_module.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert not dispatch.has_module(name)
            assert not dispatch.has_module(name)
    finally:
        dispatch.has_module.cache_clear()
    assert [record.getMessage() for record in caplog.records] == [
        f"{name} is not installed: compression and vector-quantized linears run more slowly ({command})"
    ]
