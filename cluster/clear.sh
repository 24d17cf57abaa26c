# shellcheck shell=bash
# Removes all that a cluster leaves on the machine outside its state folder, whether it went down in order or was killed.
# Only what is certainly ours: in our cgroup, under our state folder, on our link, or serving our containerd socket.

clear_leftovers() {
  end_processes
  clear_mounts "$STATE/"
  clear_network
  clear_cgroups
  clear_files
  restore_sysctls
}

# What the kubelet, kube-proxy and we set for the whole machine, as it was before.
SYSCTLS="net.ipv4.ip_forward net.ipv4.conf.all.route_localnet kernel.panic kernel.panic_on_oops vm.overcommit_memory
  vm.panic_on_oom kernel.keys.root_maxkeys kernel.keys.root_maxbytes"
keep_sysctls() {
  [ -e "$STATE/sysctls" ] && return
  # shellcheck disable=SC2086
  sysctl -e $SYSCTLS >"$STATE/sysctls.part" 2>/dev/null || true
  mv "$STATE/sysctls.part" "$STATE/sysctls"
}
restore_sysctls() {
  [ -e "$STATE/sysctls" ] || return 0
  sysctl -q -p "$STATE/sysctls" >/dev/null 2>&1 || true
  rm -f "$STATE/sysctls"
}

# buildah leaves its store bound on itself, and a build that was killed its root; not while one runs.
clear_image_mounts() {
  [ -e "$CACHE/images/.lock" ] || return 0
  (flock -n 8 || exit 0; clear_mounts "$CACHE/images/") 8<"$CACHE/images/.lock"
}

# Ours by three signs, since a kill of everything leaves no parent to ask: recorded, in the cgroup, or a containerd shim.
our_processes() {
  local file name root pid
  for file in "$RUN"/*.pid; do
    [ -e "$file" ] || continue
    name=$(basename "$file" .pid)
    pid_of "$name" || true
  done
  for root in $(cgroup_roots); do
    [ -d "$root/$CGROUP" ] || continue
    find "$root/$CGROUP" -name cgroup.procs -exec cat {} + 2>/dev/null || true
  done
  for pid in $(pgrep -f -- "^/[^ ]*containerd-shim[^ ]* .*-address $CONTAINERD_SOCKET( |\$)" || true); do echo "$pid"; done
}

end_processes() {
  local pids pid i
  # In rounds: a shim may start a process (its own clean-up) while we look.
  for ((i = 0; i < 50; i++)); do
    # 0 is a process outside this pid namespace; ourselves we are not.
    # A zombie has ended, though its parent may take long to notice.
    pids=$(our_processes | sort -un | grep -vx -e 0 -e "$$" \
      | while read -r pid; do if start_time "$pid" >/dev/null; then echo "$pid"; fi; done || true)
    [ -n "$pids" ] || break
    # shellcheck disable=SC2086
    kill -9 $pids 2>/dev/null || true
    sleep 0.1
  done
  rm -f "$RUN"/*.pid
}

# Deepest first, and again, since one path may be mounted several times over.
clear_mounts() {
  local below=$1 i mounts mount
  for ((i = 0; i < 5; i++)); do
    mounts=$(awk -v at="$below" 'index($5 "/", at) == 1 { print $5 }' /proc/self/mountinfo | sort -r)
    [ -n "$mounts" ] || break
    while read -r mount; do umount -l "$mount" 2>/dev/null || true; done <<<"$mounts"
  done
  # Network namespaces were files there; the links of a namespace go with it.
}

clear_network() {
  local command table
  ip link delete "$NODE_LINK" 2>/dev/null || true
  # Chains of another Kubernetes or of podman look alike: ours are there only after our start.
  [ -e "$STATE/made-chains" ] || return 0
  for command in iptables ip6tables; do
    command -v "$command" >/dev/null || continue
    for table in filter nat mangle; do clear_chains "$command" "$table"; done
  done
  rm -f "$STATE/made-chains"
}

# The chains of kube-proxy, kubelet and the CNI plugins, and the rules of other chains that jump to them; one restore,
# not hundreds of commands.
clear_chains() {
  local command=$1 table=$2 saved
  saved=$("$command-save" -t "$table" 2>/dev/null || true)
  grep -qE '^:(KUBE-|CNI-)' <<<"$saved" || return 0
  {
    echo "*$table"
    sed -nE 's/^:((KUBE|CNI)-[^ ]+) .*/:\1 - [0:0]/p' <<<"$saved" # names and empties them
    sed -nE '/^-A (KUBE|CNI)-/d; /^-A .* -j (KUBE|CNI)-/s/^-A/-D/p' <<<"$saved"
    sed -nE 's/^:((KUBE|CNI)-[^ ]+) .*/-X \1/p' <<<"$saved"
    echo COMMIT
  } | "$command-restore" --noflush
}

clear_cgroups() {
  local root
  for root in $(cgroup_roots); do
    [ -d "$root/$CGROUP" ] || continue
    find "$root/$CGROUP" -depth -type d -exec rmdir {} + 2>/dev/null || true
  done
}

clear_files() {
  local socket file id
  rm -rf "${STATE:?}"/containerd-state "${STATE:?}"/runc "${STATE:?}"/cni-addresses "${STATE:?}"/run
  rm -f "$STATE"/containerd.sock*
  # Places that these programs let nobody choose. Results of our CNI network carry its name.
  if [ -e "$STATE/made-var-lib-kubelet" ]; then rm -rf /var/lib/kubelet "$STATE/made-var-lib-kubelet"; fi
  rm -f /var/lib/cni/results/athanor-*
  # The loopback's are named by the sandbox alone: stale where no shim serves that sandbox any more.
  for file in /var/lib/cni/results/cni-loopback-*-lo; do
    id=${file##*cni-loopback-}
    pgrep -f -- "containerd-shim.* -id ${id%-lo}" >/dev/null || rm -f "$file"
  done
  rmdir /var/lib/cni/results /var/lib/cni 2>/dev/null || true
  find /var/log/containers -type l -lname "$STATE/*" -delete 2>/dev/null || true
  rmdir /var/log/containers 2>/dev/null || true
  # A shim's socket has a hash for a name: those that nobody listens on belong to no running shim, ours or other.
  for socket in /run/containerd/s/*; do
    [ -S "$socket" ] || continue
    ss -xlH src "$socket" 2>/dev/null | grep -q . || rm -f "$socket"
  done
  rmdir /run/containerd/s /run/containerd 2>/dev/null || true
}
