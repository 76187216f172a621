// The extension module: the kernels of each variant that this processor can run, as functions of Python.

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <string.h>

#include "kernel.h"

#define MOST 20 // arguments of a kernel
#define FILES(variant) {#variant, {variant##_noise, variant##_weights, variant##_bits, variant##_unpacking, variant##_checksum}}
#define DECLARED(variant) extern const Kernel variant##_noise[], variant##_weights[], variant##_bits[], variant##_unpacking[], variant##_checksum[]

typedef struct {
    const char *name;
    const Kernel *files[5];
} Variant;

DECLARED(baseline);
#ifdef X86_64
DECLARED(avx2);
DECLARED(avx512);
static const Variant VARIANTS[] = {FILES(avx512), FILES(avx2), FILES(baseline)}; // the fastest first
#else
static const Variant VARIANTS[] = {FILES(baseline)};
#endif
#define NUMBER (sizeof VARIANTS / sizeof *VARIANTS)

static int runs_here(const Variant *variant) {
#ifdef X86_64 // the flags of setup.py
    int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    if (!strcmp(variant->name, "avx2")) return avx2;
    if (!strcmp(variant->name, "avx512"))
        return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return __builtin_cpu_supports("sse4.1"); // every x86-64 since 2008
#else
    return 1;
#endif
}

static PyObject *call(PyObject *self, PyObject *const *values, Py_ssize_t count) {
    const Kernel *kernel = PyCapsule_GetPointer(self, NULL);
    Argument arguments[MOST];
    if (kernel == NULL) return NULL;
    if (count != (Py_ssize_t)strlen(kernel->arguments))
        return PyErr_Format(PyExc_TypeError, "the kernel %s takes %d arguments, got %zd.", kernel->name, (int)strlen(kernel->arguments), count);
    for (Py_ssize_t i = 0; i < count; i++) {
        if (kernel->arguments[i] == 'f')
            arguments[i].real = PyFloat_AsDouble(values[i]);
        else
            arguments[i].word = values[i] == Py_None ? 0 : PyLong_AsUnsignedLongLongMask(values[i]);
        if (PyErr_Occurred()) return NULL;
    }
    Py_BEGIN_ALLOW_THREADS;
    kernel->call(arguments);
    Py_END_ALLOW_THREADS;
    Py_RETURN_NONE;
}

static PyMethodDef KERNEL_METHOD = {"kernel", (PyCFunction)(void (*)(void))call, METH_FASTCALL, NULL};

static int put(PyObject *dict, const char *name, PyObject *value) { // takes the reference
    int failed = value == NULL || PyDict_SetItemString(dict, name, value) < 0;
    Py_XDECREF(value);
    return !failed;
}

static PyObject *kernels_of(const Variant *variant) {
    PyObject *found = PyDict_New();
    int fine = found && put(found, "PART", PyLong_FromLong(PART)) && put(found, "AHEAD", PyLong_FromLong(AHEAD)) &&
               put(found, "KEYS", PyLong_FromLong(KEYS));
    for (size_t file = 0; fine && file < sizeof variant->files / sizeof *variant->files; file++)
        for (const Kernel *kernel = variant->files[file]; fine && kernel->name; kernel++) {
            PyObject *self = PyCapsule_New((void *)kernel, NULL, NULL);
            fine = self && put(found, kernel->name, PyCFunction_NewEx(&KERNEL_METHOD, self, NULL));
            Py_XDECREF(self);
        }
    if (!fine) Py_CLEAR(found);
    return found;
}

// variants = {name: {name of the kernel: function}}, for this processor, the fastest first.
static int fill(PyObject *module) {
    PyObject *variants = PyDict_New();
    int fine = variants != NULL;
    for (size_t i = 0; fine && i < NUMBER; i++)
        if (runs_here(VARIANTS + i)) fine = put(variants, VARIANTS[i].name, kernels_of(VARIANTS + i));
    fine = fine && PyModule_AddObjectRef(module, "variants", variants) == 0;
    Py_XDECREF(variants);
    return fine ? 0 : -1;
}

static PyModuleDef_Slot SLOTS[] = {
    {Py_mod_exec, (void *)fill},
#ifdef Py_mod_gil
    {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
    {0, NULL},
};
static PyModuleDef MODULE = {PyModuleDef_HEAD_INIT, "_kernels", NULL, 0, NULL, SLOTS, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__kernels(void) { return PyModuleDef_Init(&MODULE); }
