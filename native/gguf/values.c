/* Keys by type. The values lie unaligned in the file, so they are copied out byte by byte. */
#include "base/error.h"
#include "gguf/gguf.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#define ANEW "use a file made for this engine, or convert the checkpoint anew"

const char *dg_value_type_name(const dg_value *value) {
    static const char *const names[] = {"uint8", "int8",   "uint16", "int16",  "uint32", "int32",  "float32",
                                        "bool",  "string", "array",  "uint64", "int64",  "float64"};
    static const char *const arrays[] = {"array of uint8",  "array of int8",  "array of uint16",  "array of int16",
                                         "array of uint32", "array of int32", "array of float32", "array of bool",
                                         "array of string", "array of array", "array of uint64",  "array of int64",
                                         "array of float64"};
    return value->type == DG_VALUE_ARRAY ? arrays[value->element_type] : names[value->type];
}

bool dg_value_integer(const dg_value *value, int64_t index, int64_t *number) {
    const uint8_t *data = value->data;
    switch (value->element_type) {
#define CASE(TYPE, c_type)                                                                                             \
    case TYPE: {                                                                                                       \
        c_type found;                                                                                                  \
        memcpy(&found, data + (size_t)index * sizeof found, sizeof found);                                             \
        *number = (int64_t)found;                                                                                      \
        return true;                                                                                                   \
    }
        CASE(DG_VALUE_UINT8, uint8_t)
        CASE(DG_VALUE_INT8, int8_t)
        CASE(DG_VALUE_UINT16, uint16_t)
        CASE(DG_VALUE_INT16, int16_t)
        CASE(DG_VALUE_UINT32, uint32_t)
        CASE(DG_VALUE_INT32, int32_t)
        CASE(DG_VALUE_INT64, int64_t)
#undef CASE
    case DG_VALUE_UINT64: {
        uint64_t found;
        memcpy(&found, data + (size_t)index * sizeof found, sizeof found);
        *number = (int64_t)found;
        return found <= INT64_MAX;
    }
    default:
        return false;
    }
}

static dg_status find(const dg_file *file, const char *key, dg_value *value, dg_error *error) {
    if (dg_file_find_key(file, key, value)) return DG_OK;
    return dg_fail(error, DG_ERROR_MODEL_FILE, "%s: key \"%s\" is missing: " ANEW, dg_file_path(file), key);
}

static dg_status wrong_type(const dg_file *file, const char *key, const char *expected, const dg_value *found,
                            dg_error *error) {
    return dg_fail(error, DG_ERROR_MODEL_FILE, "%s: key \"%s\": expected %s, found %s: " ANEW, dg_file_path(file), key,
                   expected, dg_value_type_name(found));
}

static bool is_integer(dg_value_type type) {
    return type != DG_VALUE_FLOAT32 && type != DG_VALUE_FLOAT64 && type != DG_VALUE_BOOL && type != DG_VALUE_STRING &&
           type != DG_VALUE_ARRAY;
}

/* Element `index` as an integer in [min, max]. */
static dg_status integer_at(const dg_file *file, const char *key, const dg_value *value, int64_t index, int32_t min,
                            int32_t max, int32_t *number, dg_error *error) {
    int64_t found = INT64_MAX;
    if (dg_value_integer(value, index, &found) && found >= min && found <= max) {
        *number = (int32_t)found;
        return DG_OK;
    }
    char place[48] = "";
    if (value->type == DG_VALUE_ARRAY) snprintf(place, sizeof place, "element %" PRId64 " ", index);
    return dg_fail(error, DG_ERROR_MODEL_FILE,
                   "%s: key \"%s\": %sis %" PRId64 ", expected %" PRId32 " to %" PRId32 ": " ANEW, dg_file_path(file),
                   key, place, found, min, max);
}

/* Checks that `value` is one value, or an array of n. */
static dg_status one_or_n(const dg_file *file, const char *key, const dg_value *value, int64_t n, dg_error *error) {
    if (value->type != DG_VALUE_ARRAY || value->n == n) return DG_OK;
    return dg_fail(error, DG_ERROR_MODEL_FILE, "%s: key \"%s\": expected %" PRId64 " values, found %" PRId64 ": " ANEW,
                   dg_file_path(file), key, n, value->n);
}

dg_status dg_file_get_i32(const dg_file *file, const char *key, int32_t min, int32_t max, int32_t *value,
                          dg_error *error) {
    dg_value found;
    DG_TRY(find(file, key, &found, error));
    if (!is_integer(found.type)) return wrong_type(file, key, "an integer", &found, error);
    return integer_at(file, key, &found, 0, min, max, value, error);
}

dg_status dg_file_get_i32s(const dg_file *file, const char *key, int32_t min, int32_t max, int32_t *values, int64_t n,
                           dg_error *error) {
    dg_value found;
    DG_TRY(find(file, key, &found, error));
    if (!is_integer(found.element_type)) return wrong_type(file, key, "integers", &found, error);
    DG_TRY(one_or_n(file, key, &found, n, error));
    for (int64_t i = 0; i < n; i++)
        DG_TRY(integer_at(file, key, &found, found.type == DG_VALUE_ARRAY ? i : 0, min, max, &values[i], error));
    return DG_OK;
}

dg_status dg_file_get_f32(const dg_file *file, const char *key, float min, float max, float *value, dg_error *error) {
    dg_value found;
    double number;
    DG_TRY(find(file, key, &found, error));
    if (found.type == DG_VALUE_FLOAT32) {
        float single;
        memcpy(&single, found.data, sizeof single);
        number = single;
    } else if (found.type == DG_VALUE_FLOAT64) {
        memcpy(&number, found.data, sizeof number);
    } else {
        return wrong_type(file, key, "a float32", &found, error);
    }
    if (!isfinite(number) || number < min || number > max)
        return dg_fail(error, DG_ERROR_MODEL_FILE, "%s: key \"%s\" is %g, expected %g to %g: " ANEW, dg_file_path(file),
                       key, number, (double)min, (double)max);
    *value = (float)number;
    return DG_OK;
}

dg_status dg_file_get_bools(const dg_file *file, const char *key, bool *values, int64_t n, dg_error *error) {
    dg_value found;
    DG_TRY(find(file, key, &found, error));
    if (found.element_type != DG_VALUE_BOOL) return wrong_type(file, key, "bools", &found, error);
    DG_TRY(one_or_n(file, key, &found, n, error));
    const uint8_t *data = found.data;
    for (int64_t i = 0; i < n; i++) values[i] = data[found.type == DG_VALUE_ARRAY ? i : 0] != 0;
    return DG_OK;
}

dg_status dg_file_get_bool(const dg_file *file, const char *key, bool *value, dg_error *error) {
    dg_value found;
    DG_TRY(find(file, key, &found, error));
    if (found.type != DG_VALUE_BOOL) return wrong_type(file, key, "a bool", &found, error);
    *value = *(const uint8_t *)found.data != 0;
    return DG_OK;
}

dg_status dg_file_get_string(const dg_file *file, const char *key, const char **text, size_t *n_bytes,
                             dg_error *error) {
    dg_value found;
    DG_TRY(find(file, key, &found, error));
    if (found.type != DG_VALUE_STRING) return wrong_type(file, key, "a string", &found, error);
    *text = found.data;
    *n_bytes = found.n_bytes;
    return DG_OK;
}

dg_status dg_file_get_array(const dg_file *file, const char *key, dg_value_type element_type, dg_value *array,
                            dg_error *error) {
    dg_value found, expected = {.type = DG_VALUE_ARRAY, .element_type = element_type};
    DG_TRY(find(file, key, &found, error));
    if (found.type != DG_VALUE_ARRAY || found.element_type != element_type)
        return wrong_type(file, key, dg_value_type_name(&expected), &found, error);
    *array = found;
    return DG_OK;
}

bool dg_string_equals(const char *string, size_t n_bytes, const char *text) {
    return strlen(text) == n_bytes && memcmp(string, text, n_bytes) == 0;
}

bool dg_value_next_string(const dg_value *array, size_t *offset, const char **text, size_t *n_bytes) {
    if (*offset >= array->n_bytes) return false;
    uint64_t length;
    memcpy(&length, (const uint8_t *)array->data + *offset, sizeof length);
    *text = (const char *)array->data + *offset + sizeof length;
    *n_bytes = (size_t)length;
    *offset += sizeof length + (size_t)length;
    return true;
}
