/* A model's weights in device memory. */
#ifndef DG_CUDA_WEIGHTS_CUH
#define DG_CUDA_WEIGHTS_CUH

#include <unordered_map>

#include "cuda/device.cuh"

/* What the backend has made of the mapped file on one device. */
struct DeviceModel {
    int number = 0;        /* of the device, as the runtime counts */
    char *arena = nullptr; /* the one allocation that every weight and vector of the model lies in: layout.h */
    const float *frequencies = nullptr; /* (n_layers, frequency_stride) of the rotation */
    int frequency_stride = 0;
    int n_multiprocessors = 0;
    bool hopper = false; /* hopper_available */

    struct Place {
        const char *address; /* in the arena */
        int32_t type;        /* as which it is stored there */
    };
    std::unordered_map<const void *, Place> places; /* by address in the file */

    /* NULL where the model has no such vector. */
    const float *vector(const float *source) const { return (const float *)place(source).address; }
    DeviceWeight weight(const dg_weight &w) const {
        const Place p = place(w.data);
        return {p.address, vector(w.scale), p.type, w.n_rows, w.n_cols};
    }
    /* The router has float32 rows of its own. */
    DeviceWeight router(const dg_model &model, const dg_moe &moe) const {
        return {place(moe.router).address, nullptr, DG_TYPE_F32, model.n_experts, model.n_embd};
    }

  private:
    Place place(const void *source) const {
        const auto found = places.find(source);
        return found != places.end() ? found->second : Place{nullptr, 0};
    }
};

/* dg_model.backend_data: a DeviceModel for each of model.gpus. The model goes on naming addresses in the file. */
static inline DeviceModel *device_model(const dg_model *model, int32_t place) {
    return (DeviceModel *)model->backend_data + place;
}

/* dg_backend_ops.load_model and unload_model */
dg_status load_model(dg_model *model, const dg_model_params *params, dg_error *error);
void unload_model(dg_model *model);

#endif
