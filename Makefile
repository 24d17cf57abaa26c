# Athanor's entry point: `make help` lists what there is. Settings: scripts/env.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup fmt lint test test-unit test-apiserver test-cluster test-chaos test-chart test-clients test-suites test-soak test-schemas bench-data bench-quality bench-train bench-drift bench-serve bench-tools bench-operator build images generate demo demo-chat demo-down cluster cluster-down cluster-status kubeconfig

ENV := . scripts/env &&
CARGO := $(ENV) cargo

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sort | awk -F ':.*## ' '{printf "  %-16s %s\n", $$1, $$2}'

setup: ## install what is missing: Debian packages, libtorch, the base model, the demo's data
	@scripts/setup

build: setup ## compile every binary
	@$(CARGO) build --release --workspace --bins

images: build ## build the five images from images/*.Dockerfile
	@scripts/images

generate: setup ## write the CRDs (crds/*.yaml and the chart's copies) from the Rust types
	@$(CARGO) run --release -q --bin crdgen -- crds
	@cp crds/*.yaml helm/athanor/crds/

fmt: ## format the code
	@cargo fmt --all

lint: setup ## rustfmt and clippy, warnings are errors
	@cargo fmt --all -- --check
	@$(CARGO) clippy --release --workspace --all-targets -- -D warnings

test: ## every test: unit, parity, real API server, chart, and the whole loop with kills on a real cluster
	@scripts/test

test-unit: setup ## tests that need no cluster (parity and two-rank training included)
	@$(CARGO) test --release --workspace

test-apiserver: setup ## admission, and the operator's requests, faults and fail-over against a real etcd and kube-apiserver
	@cluster/tools --only etcd,helm,kubernetes
	@$(CARGO) test --release --workspace --test apiserver -- --ignored --test-threads=1

test-chart: ## helm lint, template, schema errors; promtool on rules
	@cluster/tools --only helm
	@helm/check

test-cluster: ## kill tests, bad input, llama.cpp's server on the running cluster (after `make demo` and `make demo-chat`)
	@scripts/images llamacpp
	@$(CARGO) test --release --workspace --test cluster -- --ignored --test-threads=1 --nocapture --skip chaos::

test-clients: setup ## transformers, tritonclient, tensorboard, ... against our artifact and server, in a Python environment of their own
	@scripts/test-clients

test-soak: setup ## ten minutes of mixed requests through the router, then ten times the load the machine can serve (SOAK_SECONDS)
	@scripts/test-load soak --seconds $${SOAK_SECONDS:-600}

test-schemas: setup ## structured output for 500 schemas, checked by an independent validator
	@scripts/test-load structured

test-suites: setup ## suites of openai, langchain-tests, compatcanary, the AI SDK, schemathesis, ... against our servers (docs/clients.md)
	@scripts/test-suites

test-chaos: ## 50 kills at random on the running cluster, the loop under traffic (after `make demo`; CHAOS_KILLS, CHAOS_SEED)
	@$(CARGO) test --release --workspace --test cluster -- --ignored --nocapture chaos::

bench-quality: setup ## what distillation, selection and eight bits keep, on real rows (an hour and more)
	@scripts/fetch teacher
	@scripts/bench quality
bench-data: setup ## memory and time of preparing ten million rows
	@scripts/bench data
bench-train: setup ## training speed, memory and start side by side with transformers' Trainer
	@scripts/bench train

bench-drift: setup ## detection of drift and false alarms on 200 streams, side by side with evidently
	@scripts/bench drift

bench-serve: setup ## tokens and requests a second side by side with llama.cpp and onnxruntime
	@scripts/bench serve

bench-tools: setup ## calls of functions side by side with llama.cpp: bfcl-eval with Qwen2.5-Coder-1.5B (TOOLS_CASES)
	@scripts/bench tools --cases $${TOOLS_CASES:-40}

bench-operator: setup ## thousands of jobs on nodes played by kwok, side by side with Kubeflow Trainer and JobSet
	@scripts/bench operator

demo: ## the whole loop on a real single-node Kubernetes
	@scripts/demo

demo-chat: ## the whole loop for a language model: LoRA, streams, corrections, retraining
	@scripts/demo chat

demo-down: cluster-down ## end the demo and leave the machine as it was

cluster: ## start the local cluster: Kubernetes, Kafka, S3, Prometheus
	@cluster/tools && cluster/up

cluster-down: ## stop it and remove all it made but the caches
	@cluster/down --purge

cluster-status: ## what runs, and whether it is well
	@cluster/status

kubeconfig: ## print the path of the kubeconfig
	@cluster/kubeconfig
