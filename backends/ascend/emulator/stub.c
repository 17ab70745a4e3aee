/* CANN's runtime as torch_npu sees it while it loads, on a machine that has none: one device, with a name.
 *
 * Nothing is computed, allocated or sent here. Functions that torch_npu links and that do not stand below return 0, which
 * is CANN's ACL_SUCCESS, and write nothing; build.py appends them. Signatures: CANN's public acl headers, as torch_npu's
 * third_party/acl/inc repeats them. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define OK 0
#define NO_CONTEXT 107002 /* ACL_ERROR_RT_CONTEXT_NULL: no device was set in this thread */
#define VERSION_BYTES 128 /* ACL_PKG_VERSION_MAX_SIZE */

static __thread int32_t current = -1;

static int version(char *out) {
  const char *value = getenv("DSV4_HAL_STUB_CANN");
  if (value == NULL) return 1;
  strncpy(out, value, VERSION_BYTES - 1);
  return OK;
}

int aclrtGetDeviceCount(uint32_t *count) {
  *count = 1;
  return OK;
}

int aclrtSetDevice(int32_t device) {
  current = device;
  return OK;
}

int aclrtGetDevice(int32_t *device) {
  if (current < 0) return NO_CONTEXT;
  *device = current;
  return OK;
}

const char *aclrtGetSocName(void) { return getenv("DSV4_HAL_STUB_SOC"); }

const char *aclGetRecentErrMsg(void) { return "this is no CANN, but the stub that dsv4-hal emulates operators on"; }

/* The two below are looked up by name: not in the wheel's list of undefined symbols. */
int aclsysGetCANNVersion(int package, char *out) {
  (void)package;
  return version(out);
}

int aclsysGetVersionStr(char *package, char *out) {
  (void)package;
  return version(out);
}
