# demo, test, check, bench, chaos, soak: each prepares what it needs. See CONTRIBUTING.md.
.PHONY: demo test check bench chaos soak format clean

BIN := .venv/bin

demo:
	@scripts/setup base
	@$(BIN)/python examples/demo/demo.py $(FOLDER)

test:
	@scripts/setup test
	AQUEUE_REQUIRE_SERVERS=1 $(BIN)/python -m pytest -n 3 --dist loadfile $(ARGS)

check:
	@scripts/setup check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

bench:
	@scripts/setup bench
	$(BIN)/python -m benchmarks $(ARGS)

chaos:
	@scripts/setup test
	$(BIN)/python -m tests.chaos $(ARGS)

soak:
	@scripts/setup test
	$(BIN)/python -m tests.chaos.soak $(ARGS)

format:
	@scripts/setup check
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .bench .chaos build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .demo
