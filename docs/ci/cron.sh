#!/bin/sh
# For a crontab: 17 3 * * * /opt/twinwalk/docs/ci/cron.sh /var/lib/twinwalk
# Runs the library once a day into a folder named by the date, and prints, and so mails, only what is new or went wrong.
# Further arguments go to `twinwalk run`.
set -u
keep=${1:?usage: cron.sh FOLDER [ARGUMENT OF RUN...]}
shift
today=$keep/$(date +%Y-%m-%d-%H%M%S)
mkdir -p "$today" || exit 3
cd "$(dirname "$0")/../.." || exit 3

once() {
	./twinwalk run --junit "$today/result.xml" --json "$today/result.json" --bundles "$today/bundles" "$@" \
		>"$today/output" 2>&1
}

once "$@"
status=$?
if [ $status -eq 3 ]; then # a machine was lost: that says nothing about what is tested
	once "$@"
	status=$?
fi
[ $status -eq 0 ] || cat "$today/output"
exit $status
